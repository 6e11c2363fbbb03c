"""How commands of the repository start."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(__file__).resolve().parent.parent / "bin"
INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
STARTED = "import signal\ndef main():\n    return int(signal.SIGINT)\n"


@pytest.mark.parametrize(
    ("module", "code"), [(INTERRUPTED, -signal.SIGINT), (STARTED, signal.SIGINT)]
)
def test_an_interrupt_within_imports_ends_a_command_without_a_word(
    tmp_path: Path, module: str, code: int
) -> None:
    (tmp_path / "made_up_command.py").write_text(module)
    script = (
        f"import sys; sys.path[:0] = [{str(BIN)!r}, {str(tmp_path)!r}]; "
        "from _launch import launch; launch('made_up_command')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
