"""Accuracy over epsilon: from scratch, classifier alone, all layers, from one network.

Pre-trains once without privacy, then runs every epsilon, seed and kind with
bin/dpsgd-train, and collects a table. Runs that are finished are skipped, one that was
stopped goes on, and after --minutes the running one is stopped at a checkpoint, so that
the whole can be done in pieces:

    python benchmarks/finetune.py --folder runs/finetune --minutes 9 \
        --set data.root=data --save benchmarks/results/finetune_NAME.json

Seeds make the runs repeatable, and so unfit to be released as private.
"""

import argparse
import itertools
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpsgd.report import RunDirectory, environment, to_json

ROOT = Path(__file__).resolve().parent.parent
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
KINDS = ("scratch", "classifier", "all")
# The classifier has few parameters and small features, so it takes larger steps.
CLASSIFIER = [
    "finetune.train=classifier",
    "data.fixed_views=true",
    "optimizer.learning_rate=4",
]


@dataclass(frozen=True)
class Job:
    """One run of bin/dpsgd-train; kind, epsilon and seed are those of a table's row."""

    name: str
    config: str
    overrides: list[str]
    kind: str = "pre-training"
    epsilon: int | None = None
    seed: int = 0


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Yields all runs, the pre-training first, then seed by seed."""
    network, folder = arguments.network, arguments.folder
    common = arguments.set
    pretrained = f"pretrain_{network}"
    yield Job(
        pretrained,
        f"pretrain_tiny-imagenet-32_{network}",
        ["train.seed=0", *common, *arguments.set_public],
    )
    begun = [f"model.init_from={folder / pretrained}"]
    cache = f"runtime.feature_cache={folder / f'features_{network}.safetensors'}"
    settings = {
        "scratch": [],
        "classifier": [*begun, *CLASSIFIER, cache],
        "all": begun,
    }
    for seed, epsilon, kind in itertools.product(
        range(arguments.seeds), arguments.epsilons, arguments.kinds
    ):
        config = f"cifar10_{network}_finetune_eps{epsilon}"
        if kind == "scratch":
            config = f"cifar10_{network}_eps{epsilon}"
            if not (ROOT / "configs" / f"{config}.yaml").exists():
                continue  # the paper has no such setting
        yield Job(
            f"{kind}_{network}_eps{epsilon}_seed{seed}",
            config,
            [f"train.seed={seed}", *settings[kind], *common, *arguments.set_private],
            *(kind, epsilon, seed),
        )


def run(job: Job, folder: Path, *, seconds: float) -> bool:
    """Starts a run or goes on with it; returns whether it is finished."""
    directory = RunDirectory(folder / job.name)
    if directory.report.exists():
        return True
    command = [sys.executable, str(ROOT / "bin" / "dpsgd-train")]
    if any(directory.checkpoints.glob("step-*")):
        command += ["--resume", str(directory.path)]
    else:
        if directory.path.exists():  # stopped before its first checkpoint
            shutil.rmtree(directory.path)
        config = str(ROOT / "configs" / f"{job.config}.yaml")
        settings = [word for one in job.overrides for word in ("--set", one)]
        command += [config, "--run-dir", str(directory.path), *settings]
    process = subprocess.Popen(command)
    try:
        code = process.wait(timeout=None if seconds == math.inf else seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait()
    if code not in (0, *STOPPED):
        sys.exit(f"{job.name}: bin/dpsgd-train ended with code {code}")
    return code == 0


def result(job: Job, folder: Path) -> dict[str, Any] | None:
    """Returns a row of the results, None if the run is not finished."""
    report = RunDirectory(folder / job.name).report
    if not report.exists():
        return None
    facts = json.loads(report.read_text())
    told = ("private", "epsilon", "delta", "num_steps", "train_seconds")
    row = {
        "run": job.name,
        "kind": job.kind,
        "target_epsilon": job.epsilon,
        "seed": job.seed,
    }
    accuracy = facts["test_accuracy_ema"] or facts["test_accuracy"]
    return {**row, "test_accuracy": accuracy, **{name: facts[name] for name in told}}


def show(rows: list[dict[str, Any]], epsilons: list[int]) -> None:
    """Prints the mean and spread over seeds, a line for each epsilon."""
    table = Table(title="Test accuracy in %, averaged weights: mean (std) over seeds")
    table.add_column("epsilon", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for epsilon in epsilons:
        cells = []
        for kind in KINDS:
            found = [
                100 * row["test_accuracy"]
                for row in rows
                if (row["kind"], row["target_epsilon"]) == (kind, epsilon)
            ]
            spread = f" ({statistics.stdev(found):.2f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}" if found else "-")
        table.add_row(str(epsilon), *cells)
    Console(width=88).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--network", default="wrn16-4", choices=["wrn16-4", "wrn28-10"])
    parser.add_argument("--epsilons", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop")
    for name, which in (
        ("set", "every run"),
        ("set-public", "the pre-training"),
        ("set-private", "the private runs"),
    ):
        text = f"section.key=value for {which}; may be repeated"
        parser.add_argument(f"--{name}", action="append", default=[], help=text)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    planned = list(jobs(arguments))
    for job in planned:
        seconds = deadline - time.monotonic()
        if seconds <= 0 or not run(job, arguments.folder, seconds=seconds):
            print(f"out of time at {job.name}: start again to go on")
            break
    found = [result(job, arguments.folder) for job in planned]
    rows = [row for row in found if row is not None]
    show(rows, arguments.epsilons)
    print(f"{len(rows)} of {len(planned)} runs are finished")
    if arguments.save:
        text = to_json({**environment(), "rows": rows}, indent=1)
        arguments.save.write_text(text + "\n")


if __name__ == "__main__":
    main()
