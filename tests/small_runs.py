"""Settings, starts and commands for runs of a few seconds on the embedded digits."""

import functools
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from PIL import Image

from dpsgd.assembly import assemble
from dpsgd.audit import audit
from dpsgd.checkpoint import CheckpointStore
from dpsgd.cli import evaluate, train
from dpsgd.config import Config, parse_config
from dpsgd.data import load_datasets
from dpsgd.planning import Plan
from dpsgd.privacy import AuditResult, EpsilonBound, PRVAccountant
from dpsgd.run import Run, TrainState

ROOT = Path(__file__).resolve().parent.parent
TIMES = {
    "train_seconds",
    "views_per_second",
    "wall_time_seconds",
    "finished_at",
    "peak_memory_bytes",
}

Changes = Mapping[str, Any]


class RememberingAccountant(PRVAccountant):
    """The real accountant, asked once a session for each mechanism of the tests."""

    def epsilon(self, phases: Any, delta: float) -> EpsilonBound:
        return _epsilon(tuple(phases), delta)

    def epsilon_curve(self, *, steps: Any, **phase: Any) -> list[EpsilonBound]:
        return list(_epsilon_curve(tuple(steps), **phase))


@functools.cache
def _epsilon(phases: Any, delta: float) -> EpsilonBound:
    return PRVAccountant().epsilon(phases, delta)


@functools.cache
def _epsilon_curve(steps: Any, **phase: Any) -> tuple[EpsilonBound, ...]:
    return tuple(PRVAccountant().epsilon_curve(steps=list(steps), **phase))


def remembering() -> Any:
    """Lets what runs inside this context share the answers of the accountant."""
    accountants = {PRVAccountant.name: RememberingAccountant}
    return mock.patch.dict("dpsgd.privacy.registry.ACCOUNTANTS", accountants)


def dpsgd_train(*arguments: str | Path) -> int:
    """Runs bin/dpsgd-train in this process, and returns its exit code."""
    with remembering():
        return train.main([str(argument) for argument in arguments])


def dpsgd_eval(*arguments: str | Path) -> int:
    """Runs bin/dpsgd-eval in this process, and returns its exit code."""
    return evaluate.main([str(argument) for argument in arguments])


def small_settings(changes: Changes | None = None) -> dict[str, dict[str, Any]]:
    """Sections of a seeded run of four steps; `changes` has dotted names."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": "digits"},
        "model": {"name": "wide_resnet", "depth": 10, "width": 1},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-4,
            "expected_batch_size": 16,
        },
        "optimizer": {"learning_rate": 0.5},
        "ema": {"decay": 0.9},
        "train": {"num_steps": 4, "seed": 7},
        "eval": {"every": 2},
        "runtime": {"device": "cpu", "checkpoint_every": 1},
    }
    for name, value in (changes or {}).items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def small_config(changes: Changes | None = None) -> Config:
    """The same, read and checked."""
    return parse_config(small_settings(changes))


def write_config(folder: Path, changes: Changes | None = None) -> str:
    """The same, as a file; returns its path."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(small_settings(changes)))
    return str(path)


def write_parquet(path: Path, **columns: Sequence[Any]) -> str:
    """Writes random grey images of three classes, with more columns; returns the path.

    A file has as many rows as its columns.
    """
    (count,) = {len(column) for column in columns.values()}
    rng = np.random.default_rng(count)
    cells = []
    for pixels in rng.integers(0, 256, (count, 8, 8), dtype=np.uint8):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    feature = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
    info = json.dumps({"info": {"features": {"label": feature}}})
    labels = [row % 3 for row in range(count)]
    table = pa.table({"img": cells, "label": labels, **columns})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": info}), path
    )
    return str(path)


def start(
    folder: Path, changes: Changes | None = None, *, resume: bool = False
) -> tuple[Run, TrainState, Plan]:
    """Assembles a run whose checkpoints lie in a folder, anew or from the newest."""
    config = small_config(changes)
    store = CheckpointStore(folder, keep=config.runtime.keep_checkpoints)
    checkpoint = store.newest() if resume else None
    with remembering():
        return assemble(config, store=store, checkpoint=checkpoint)


def audit_of(
    run: Run, state: TrainState, *, gradients: int = 1, images: int = 0
) -> AuditResult:
    """Audits a run on its own data, at 95 %."""
    return audit(
        run,
        state,
        load_datasets(run.config.data),
        num_classes=10,
        num_gradient_canaries=gradients,
        num_image_canaries=images,
        confidence=0.95,
    )


def command(
    name: str, *arguments: str | Path, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Runs a command of bin/ in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "bin" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def benchmark_of(name: str) -> Any:
    """A script of benchmarks/, as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what differs between two runs of one seed."""
    return {key: value for key, value in record.items() if key not in TIMES}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
