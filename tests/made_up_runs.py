"""Run directories as they are left behind, without any training."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from small_runs import small_config

from dpsgd.config import config_to_dict
from dpsgd.report.drawing import to_svg

CLASSES = {"cat": (0.9, 100), "dog": (0.5, 100), "owl": (None, 0)}
PLAN = {
    "format": 2,
    "sample_rate": 0.0111,
    "num_steps": 4,
    "noise_multiplier": 1.25,
    "clipping_norm": 1.0,
    "expected_batch_size": 16.0,
    "delta": 1e-5,
    "unit": "example",
    "adjacency": "add-or-remove-one",
    "accountant": "prv",
    "noise": "standard",
    "epsilon": 2.9999,
    "num_examples": 1437,
    "num_parameters": 78650,
    "device": "cpu",
}
# Settings of files with columns, of users and of groups.
PARQUET = {
    "data.source": "parquet",
    "data.train": "train.parquet",
    "data.test": "test.parquet",
    "data.num_examples": 1437,
}
# Of a run without privacy: its settings, and what its files hold as null.
WITHOUT_PRIVACY = {
    "privacy.enabled": False,
    "privacy.noise_multiplier": None,
    "privacy.delta": None,
}
NO_MECHANISM = dict.fromkeys(
    (
        *("epsilon", "delta", "unit", "adjacency", "accountant", "noise"),
        *("noise_multiplier", "sample_rate", "clipping_norm"),
    )
)
ENVIRONMENT = {
    "commit": "0123abcd",
    "python": "3.11.7",
    "versions": {"dpsgd": "0.1.0", "torch": "2.14.1", "triton": None},
    "cuda": None,
    "device": "cpu",
    "num_threads": 2,
}


def evaluation(step: int, *, accuracy: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    line = {
        "step": step,
        "epsilon": step * 0.7499,
        "test_accuracy": accuracy,
        "test_loss": 1.5,
        "test_accuracy_ema": accuracy + 0.2,
        "test_loss_ema": 1.2,
        "train_seconds": step * 2.0,
        "views_per_second": 8.0,
    }
    return {**line, **changes}


def result(**changes: Any) -> dict[str, Any]:
    """What report.json holds."""
    return {
        **PLAN,
        "outcome": "finished",
        "per_class_accuracy": {name: share for name, (share, _) in CLASSES.items()},
        "per_class_num_examples": {name: count for name, (_, count) in CLASSES.items()},
        "views_per_second": 8.0,
        "peak_memory_bytes": 3 * 2**30,
        "wall_time_seconds": 75.0,
        "train_seconds": 8.0,
        "finished_at": "2026-11-23T16:30:20+0000",
        **ENVIRONMENT,
        **changes,
    }


# All that a finished run without privacy leaves, as arguments of `write_run`.
NON_PRIVATE_RUN: dict[str, Any] = {
    "settings": WITHOUT_PRIVACY,
    "lines": [evaluation(4, epsilon=None)],
    "plan": {**PLAN, **NO_MECHANISM},
    "report": result(**NO_MECHANISM),
}


def write_run(
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    lines: Sequence[Mapping[str, Any]] = (evaluation(2), evaluation(4)),
    report: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = PLAN,
    checkpoints: Sequence[str] = (),
) -> Path:
    """Writes a run directory, unseeded unless `settings` says otherwise.

    Args:
        folder: Where; made.
        settings: Dotted names whose values are not those of small runs.
        lines: Records of metrics.jsonl.
        report: report.json; None for a run that is not finished.
        plan: plan.json; None for a run of before it was written.
        checkpoints: Names of files, which are empty.
    """
    folder.mkdir(parents=True)
    for name in checkpoints:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / name).touch()
    config = config_to_dict(small_config({"train.seed": None, **(settings or {})}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    for name, content in (("report.json", report), ("plan.json", plan)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def texts(figure: Figure | None) -> list[str]:
    """What is written in a figure."""
    assert figure is not None
    svg = to_svg(figure, "name", is_inline=True)
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)
