"""Accuracy over epsilon: from scratch, classifier alone, all layers, from one network.

Pre-trains once without privacy, then runs every epsilon, seed and kind with
bin/dpsgd-train, and collects a table. Runs that are finished are skipped, those that
were stopped go on, and after --minutes the running ones are stopped at a checkpoint, so
that the whole can be done in pieces:

    python benchmarks/finetune.py --folder runs/finetune --minutes 9 --parallel 4 \
        --set data.root=data --save benchmarks/results/finetune_NAME.json

Runs side by side hide each other's starts, but their own times then say little; what
each prints is in FOLDER/RUN.log. A figure is drawn from what was saved:

    python benchmarks/finetune.py --plot finetune_NAME.svg --from finetune_NAME.json

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from dpsgd.report import RunDirectory, to_json
from dpsgd.report.drawing import LIGHT, new_axes, to_svg
from dpsgd.report.runs import read_evaluations

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
POLL_SECONDS = 0.1
KINDS = ("scratch", "classifier", "all")
# The classifier has few parameters, so little noise, and cheap steps: more and larger
# ones. The headers of the configs say the same.
CLASSIFIER = [
    "finetune.train=classifier",
    "data.fixed_views=true",
    "train.num_steps=250",
    "optimizer.learning_rate=8",
]
# Settings of a run that go into its row.
TOLD = {
    "expected_batch_size": ("privacy", "expected_batch_size"),
    "augmentation_multiplicity": ("data", "augmentation_multiplicity"),
    "learning_rate": ("optimizer", "learning_rate"),
}
# What the figure compares with: whole runs from scratch that are measured already, and
# De et al. 2022 (arXiv:2204.13650); docs/results.md says what is quoted unchecked.
SCRATCH_RUNS = [
    ROOT / "benchmarks" / "results" / "cifar10_wrn16-4_eps1_h100.jsonl",
    ROOT / "benchmarks" / "results" / "cifar10_wrn16-4_eps1_h200" / "metrics.jsonl",
]
PAPER = {
    "De et al., all layers: WRN-28-10, all of ImageNet": (94.8, 95.4, 96.1, 96.6),
    "De et al., from scratch": (56.8, 64.9, 71.9, 79.5),
}
PAPER_EPSILONS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Job:
    """One run of bin/dpsgd-train; kind, epsilon and seed are those of a table's row.

    It waits until the runs named in `after` are finished.
    """

    name: str
    config: str
    overrides: list[str]
    kind: str = "pre-training"
    epsilon: int | None = None
    seed: int = 0
    after: tuple[str, ...] = ()


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
    after: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS, (pretrained,))
    after["scratch"] = ()
    for seed, epsilon, kind in itertools.product(
        arguments.seeds, arguments.epsilons, arguments.kinds
    ):
        config = f"cifar10_{network}_finetune_eps{epsilon}"
        if kind == "scratch":
            config = f"cifar10_{network}_eps{epsilon}"
            if not (ROOT / "configs" / f"{config}.yaml").exists():
                continue  # the paper has no such setting
        name = f"{kind}_{network}_eps{epsilon}_seed{seed}"
        yield Job(
            name,
            config,
            [f"train.seed={seed}", *settings[kind], *common, *arguments.set_private],
            *(kind, epsilon, seed, after[kind]),
        )
        if kind == "classifier" and len(after[kind]) == 1:
            after[kind] = (pretrained, name)  # the first leaves its features to others


def run_all(
    planned: Iterable[Job], folder: Path, *, parallel: int, deadline: float
) -> bool:
    """Runs what is not finished, so many at a time; returns whether all is.

    At the deadline, and when anything goes wrong, what runs is stopped at a checkpoint.
    """
    waiting = [job for job in planned if not is_finished(job.name, folder)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            if time.monotonic() >= deadline:
                return False
            for job in startable(waiting, folder)[: parallel - len(running)]:
                waiting.remove(job)
                running[job.name] = start(job, folder, has_log=parallel > 1)
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    if not ended_well(name, code, folder):
                        return False
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return True


def is_finished(name: str, folder: Path) -> bool:
    """Returns whether a run has left its report."""
    return RunDirectory(folder / name).report.exists()


def startable(waiting: Iterable[Job], folder: Path) -> list[Job]:
    """Returns the jobs that need not wait for others."""
    return [
        job for job in waiting if all(is_finished(name, folder) for name in job.after)
    ]


def start(job: Job, folder: Path, *, has_log: bool) -> "subprocess.Popen[bytes]":
    """Starts a run, or goes on with it."""
    directory = RunDirectory(folder / job.name)
    command = [sys.executable, str(ROOT / "bin" / "dpsgd-train")]
    if any(directory.checkpoints.glob("step-*")):
        command += ["--resume", str(directory.path)]
    else:
        if directory.path.exists():  # stopped before its first checkpoint
            shutil.rmtree(directory.path)
        config = str(ROOT / "configs" / f"{job.config}.yaml")
        settings = [word for one in job.overrides for word in ("--set", one)]
        command += [config, "--run-dir", str(directory.path), *settings]
    if has_log:
        print(f"start {job.name}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
    log = log_of(job.name, folder)
    with log.open("ab") if has_log else nullcontext() as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream)


def log_of(name: str, folder: Path) -> Path:
    """Returns the file for what a run prints if others run beside it."""
    return folder / f"{name}.log"


def ended_well(name: str, code: int, folder: Path) -> bool:
    """Returns whether a run is finished, and not stopped by a signal.

    Raises:
        SystemExit: It failed.
    """
    if code not in (0, *STOPPED):
        log = log_of(name, folder)
        if log.exists():
            print("\n".join(log.read_text().splitlines()[-20:]))
        sys.exit(f"{name}: bin/dpsgd-train ended with code {code}")
    return code == 0


def result(job: Job, folder: Path) -> dict[str, Any] | None:
    """Returns a row of the results, None if the run is not finished."""
    directory = RunDirectory(folder / job.name)
    if not directory.report.exists():
        return None
    facts = json.loads(directory.report.read_text())
    settings = yaml.safe_load(directory.config.read_text())
    told = ("private", "epsilon", "delta", "noise_multiplier", "num_steps")
    return {
        "run": job.name,
        "kind": job.kind,
        "target_epsilon": job.epsilon,
        "seed": job.seed,
        "test_accuracy": facts["test_accuracy_ema"] or facts["test_accuracy"],
        **{name: facts[name] for name in (*told, "train_seconds")},
        **{name: settings[section][key] for name, (section, key) in TOLD.items()},
    }


def accuracies(rows: Iterable[dict[str, Any]], kind: str, epsilon: int) -> list[float]:
    """Returns the accuracies of all seeds in %, the lowest first."""
    return sorted(
        100 * row["test_accuracy"]
        for row in rows
        if (row["kind"], row["target_epsilon"]) == (kind, epsilon)
    )


def show(rows: Sequence[dict[str, Any]], epsilons: Iterable[int]) -> None:
    """Prints the median and range over seeds, a line for each epsilon."""
    title = "Test accuracy in %, averaged weights: median (lowest, highest) over seeds"
    table = Table(title=title)
    table.add_column("epsilon", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for epsilon in epsilons:
        cells = []
        for kind in KINDS:
            found = accuracies(rows, kind, epsilon)
            spread = f" ({found[0]:.2f}, {found[-1]:.2f})" if len(found) > 1 else ""
            cells.append(f"{statistics.median(found):.2f}{spread}" if found else "-")
        table.add_row(str(epsilon), *cells)
    Console(width=88).print(table)


def figure_of(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Draws the median of every kind over epsilon, with bars from lowest to highest."""
    from matplotlib.figure import Figure

    with new_axes("CIFAR-10 test accuracy, %", height=3.4) as axes:
        for text, accuracy in PAPER.items():
            style = {"linestyle": (0, (4, 3)), "linewidth": 1.3}
            axes.plot(PAPER_EPSILONS, accuracy, color=LIGHT["muted"], **style)
            where, above = (1, accuracy[1]), (0, 8)
            axes.annotate(text, where, above, textcoords="offset points", fontsize=8)
        for kind, label, role in (
            ("all", "all layers", "series-1"),
            ("classifier", "classifier alone", "series-2"),
            ("scratch", "from scratch", "series-3"),
        ):
            found = by_epsilon(rows, kind)
            middles = [statistics.median(them) for them in found.values()]
            ends = [(them[0], them[-1]) for them in found.values()]
            pairs = list(zip(middles, ends, strict=True))
            axes.errorbar(
                list(found),
                middles,
                yerr=(
                    [middle - low for middle, (low, _) in pairs],
                    [high - middle for middle, (_, high) in pairs],
                ),
                color=LIGHT[role],
                marker="o",
                markersize=4.5,
                capsize=3,
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(PAPER_EPSILONS, [str(epsilon) for epsilon in PAPER_EPSILONS])
        axes.minorticks_off()
        axes.set_ylim(50, 100)
        axes.set_xlabel("epsilon (upper bound), delta 1e-5")
        axes.legend(loc="lower right")
        assert isinstance(axes.figure, Figure)
        return axes.figure


def by_epsilon(rows: Sequence[dict[str, Any]], kind: str) -> dict[int, list[float]]:
    """Returns accuracies of all seeds in %; from scratch also what was known before."""
    told = {row["target_epsilon"] for row in rows if row["kind"] == kind}
    found = {epsilon: accuracies(rows, kind, epsilon) for epsilon in sorted(told)}
    if kind == "scratch":
        ends = [read_evaluations(path)[-1] for path in SCRATCH_RUNS]
        before: dict[int, list[float]] = {}
        for end in sorted(ends, key=lambda one: one.accuracy_ema):
            before.setdefault(round(end.epsilon), []).append(100 * end.accuracy_ema)
        found = dict(sorted({**before, **found}.items()))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--network", default="wrn16-4", choices=["wrn16-4", "wrn28-10"])
    parser.add_argument("--epsilons", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    for name, which in (
        ("set", "every run"),
        ("set-public", "the pre-training"),
        ("set-private", "the private runs"),
    ):
        text = f"section.key=value for {which}; may be repeated"
        parser.add_argument(f"--{name}", action="append", default=[], help=text)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument(
        "--from",
        dest="saved",
        type=Path,
        metavar="SAVED.json",
        help="show what was saved, and run nothing",
    )
    return parser.parse_args()


def collected(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what there is time for; returns the rows of all runs that are finished."""
    deadline = time.monotonic() + 60 * arguments.minutes
    planned, folder = list(jobs(arguments)), arguments.folder
    if not run_all(planned, folder, parallel=arguments.parallel, deadline=deadline):
        print("out of time, or stopped: start again to go on")
    found = [result(job, folder) for job in planned]
    rows = [row for row in found if row is not None]
    print(f"{len(rows)} of {len(planned)} runs are finished")
    if arguments.save:
        text = to_json({**machine.facts(), "rows": rows}, indent=1)
        arguments.save.write_text(text + "\n")
    return rows


def main() -> None:
    arguments = parse()
    if arguments.saved:
        rows = json.loads(arguments.saved.read_text())["rows"]
    else:
        rows = collected(arguments)
    show(rows, arguments.epsilons)
    if arguments.plot:
        svg = to_svg(figure_of(rows), arguments.plot.stem, is_inline=False)
        arguments.plot.write_text(svg)


if __name__ == "__main__":
    main()
