from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import write_config

from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepPlan, read_sweep

GRID = {"optimizer.learning_rate": [0.5, 1], "train.seed": [0, 1]}


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep over a small config; without arguments one of four runs."""

    def write(**content: Any) -> Path:
        write_config(tmp_path, {"train.seed": None})
        path = tmp_path / "rates.yaml"
        content = content or {"grid": GRID}
        path.write_text(yaml.safe_dump({"config": "small.yaml", **content}))
        return path

    return write


@pytest.fixture
def plan(sweep_file: Callable[..., Path]) -> SweepPlan:
    """Four runs: two learning rates, two seeds."""
    return read_sweep(sweep_file())


@pytest.fixture
def folder(tmp_path: Path, plan: SweepPlan) -> SweepFolder:
    """The folder of that sweep, without runs."""
    made = SweepFolder(tmp_path / "sweep")
    made.create(plan)
    return made
