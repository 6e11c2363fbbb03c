"""Runs a command of the repository, with its own environment when there is one."""

import importlib
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(module_name: str) -> None:
    """Exits with the code of `main()` of a module of this repository.

    Outside `<repository>/.venv` the script starts again inside it, if it exists.
    """
    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), *sys.argv])
    sys.path.insert(0, str(ROOT))
    # Ctrl-C within an import ends in whatever that makes of it; so it ends us at once.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where it is to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module_name).main
    signal.signal(signal.SIGINT, handler)
    sys.exit(main())
