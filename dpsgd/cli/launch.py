"""Which folder a command trains in, also where torchrun starts it again by itself."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from dpsgd.errors import ConfigError, fault
from dpsgd.parallel import Ranks
from dpsgd.report import RunDirectory, default_run_directory

__all__ = ["launch_of", "run_of"]


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
    """Returns what all processes of one torchrun share, and those of others do not."""
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return named if named != "none" else f"process {os.getppid()}"
