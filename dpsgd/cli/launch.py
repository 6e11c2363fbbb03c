"""Which folder a command trains in, also where torchrun starts it again by itself."""

import json
import os
from datetime import datetime
from pathlib import Path
from socket import gethostname
from typing import Any, Final
from uuid import uuid4

from dpsgd.errors import ConfigError, fault
from dpsgd.parallel import Ranks
from dpsgd.report import RunDirectory, default_run_directory

__all__ = ["launch_of", "run_of"]

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_START_TIME: Final = 19  # of the words of /proc/PID/stat after the name; in ticks


def run_of(
    resumed: Path | None, named: Path | None, config_path: Path, ranks: Ranks
) -> tuple[RunDirectory, bool]:
    """Returns the folder of the run, and whether to go on from its newest checkpoint.

    Processes that torchrun started again go on with the run that they began, which
    they know by the launch that its folder names. A folder of anyone else's is not
    theirs to go on with.

    Args:
        resumed: What `--resume` names, if given.
        named: What `--run-dir` names, if given.
        config_path: File of settings.
        ranks: The processes, which all train in the folder that the first one names.

    Raises:
        ConfigError: Processes may be started again, and would not find their run.
    """
    if resumed is not None:
        return RunDirectory(resumed), True
    if named is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        rule = "torchrun may start the processes again, and they must find their run"
        raise ConfigError(fault("--run-dir", None, rule, "name a folder"))
    default = str(default_run_directory(config_path, datetime.now()))
    directory = RunDirectory(named or Path(ranks.from_first(default)))
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    begun = is_restarted and _begun_by(directory) == _launch()
    return directory, ranks.from_first(begun)


def launch_of() -> dict[str, Any]:
    """Returns what a run's folder says of the launch, so that a restart finds it."""
    return {"launch": _launch()} if "TORCHELASTIC_RUN_ID" in os.environ else {}


def _begun_by(directory: RunDirectory) -> str | None:
    """Returns the launch that began the run in a folder; None if there is none."""
    try:
        found = json.loads(directory.environment.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return str(found.get("launch"))


def _launch() -> str:
    """Returns what all processes of one torchrun share, and those of others do not.

    That is its rendezvous id or, without one, torchrun itself, their parent. Its number
    alone names no process: in every container it may be 1, and numbers come again. A
    machine's name may be another container's, too, so the machine is told by its boot.
    """
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if named != "none":
        return named
    parent = os.getppid()
    try:
        boot = _BOOT.read_text(encoding="utf-8").strip()
        status = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8")
    except OSError:  # not Linux: a launch that cannot be told from others is like none
        return f"unknown {uuid4()}"
    started = status.rpartition(")")[2].split()[_START_TIME]
    return f"process {parent} of {gethostname()}, boot {boot}, started at {started}"
