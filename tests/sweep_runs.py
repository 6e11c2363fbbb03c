"""Runs of a sweep as they are left behind, without any training."""

from typing import Any

import yaml
from made_up_runs import evaluation, result, write_run

from dpsgd.config import config_to_dict, with_absolute_paths
from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepRun


def leave_run(
    folder: SweepFolder,
    run: SweepRun,
    *,
    accuracy: float = 0.5,
    is_finished: bool = True,
    **report: Any,
) -> None:
    """Leaves the directory of a run as if it had been trained."""
    path = folder.directory(run).path
    write_run(
        path,
        lines=[evaluation(4, accuracy=accuracy)],
        report=result(**report) if is_finished else None,
    )
    settings = config_to_dict(with_absolute_paths(run.config))
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    if not is_finished:
        (path / "checkpoints").mkdir()
        (path / "checkpoints" / "step-00000004.safetensors").touch()
