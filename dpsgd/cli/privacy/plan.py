"""`dpsgd-privacy plan`: noise and compute of many ways to spend a budget."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from dpsgd.cli.errors import UsageParser
from dpsgd.cli.privacy.options import (
    Commands,
    add_accountant,
    add_command,
    as_count,
    as_number,
    delta_of,
    num_examples_of,
)
from dpsgd.errors import ConfigError, fault, writable
from dpsgd.privacy import build_accountant, rounded_up
from dpsgd.privacy.mechanism import check_target_epsilon
from dpsgd.privacy.planner import Budget, PlannedRun

__all__ = ["add_to"]

_EPOCHS: Final = ("10", "30", "100", "300", "1000")
_HEADINGS: Final = (
    "batch",
    "steps",
    "epochs",
    "examples",
    "noise multiplier",
    "noise a coordinate",
    "epsilon",
)


def add_to(commands: "Commands[UsageParser]") -> None:
    """Adds `plan`.

    Args:
        commands: What it is added to.
    """
    command = add_command(
        commands, "plan", "the noise and the compute of batch sizes and steps"
    )
    command.add_argument("--target-epsilon", required=True, metavar="EPSILON")
    command.add_argument("--delta", required=True, metavar="DELTA", help="below 1/N")
    command.add_argument(
        "--num-examples", required=True, metavar="N", help="size of the training set"
    )
    command.add_argument(
        "--batch-sizes", required=True, nargs="+", metavar="B", help="expected sizes"
    )
    lengths = command.add_mutually_exclusive_group()
    lengths.add_argument("--num-steps", nargs="+", metavar="T")
    lengths.add_argument(
        "--epochs", nargs="+", metavar="E", help=f"default: {' '.join(_EPOCHS)}"
    )
    command.add_argument("--clipping-norm", default="1", metavar="C", help="default: 1")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw noise against compute, as PNG"
    )
    add_accountant(command, default="pld")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Plans all, and shows or draws it."""
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    budget = _budget(arguments)
    runs = _runs(arguments, budget)
    if arguments.json:
        print(json.dumps(_report(budget, runs), indent=2, allow_nan=False))
    else:
        Console().print(_table(budget, runs))
    if arguments.plot is not None:
        # matplotlib takes a second to import, which only a picture is worth.
        from dpsgd.cli.privacy.picture import draw

        _write_plot(arguments.plot, draw(budget, runs))


def _check_plot(path: Path) -> None:
    """Raises ConfigError unless a picture can be written there, over nothing."""
    if path.suffix.lower() != ".png":
        raise ConfigError(fault("plot", path, "must end in .png", "rename it"))
    if path.exists():
        raise ConfigError(fault("plot", path, "exists already", "take another name"))
    if not path.absolute().parent.is_dir():
        raise ConfigError(fault("plot", path, "has no folder", "create its folder"))


def _write_plot(path: Path, content: bytes) -> None:
    """Writes a file that was not there, whole or not at all.

    Raises:
        ConfigError: It is there by now, or cannot be written.
    """
    with (
        writable("plot", path, remedy="take another place"),
        path.open("xb") as file,
    ):
        try:
            file.write(content)
            file.flush()
        except OSError:
            path.unlink()
            raise


def _budget(arguments: argparse.Namespace) -> Budget:
    """Returns what may be spent."""
    target_epsilon = as_number("target_epsilon", arguments.target_epsilon)
    check_target_epsilon(target_epsilon)
    return Budget(
        target_epsilon=target_epsilon,
        delta=delta_of(arguments),
        num_examples=num_examples_of(arguments),
        clipping_norm=_positive("clipping_norm", arguments.clipping_norm),
        accountant=build_accountant(arguments.accountant),
    )


def _positive(field: str, text: str) -> float:
    """Returns an argument that must be finite and above 0."""
    value = as_number(field, text)
    if not 0 < value < float("inf"):
        raise ConfigError(fault(field, value, "must be above 0 and finite", "raise it"))
    return value


def _runs(arguments: argparse.Namespace, budget: Budget) -> list[PlannedRun]:
    """Returns a run for each batch size and number of steps, all checked first."""
    sizes = [_positive("batch_sizes", text) for text in arguments.batch_sizes]
    too_large = [size for size in sizes if size > budget.num_examples]
    if too_large:
        rule = f"the sample rate would pass 1: must be at most {budget.num_examples}"
        raise ConfigError(fault("batch_sizes", too_large[0], rule, "lower it"))
    if arguments.num_steps is not None:
        steps = sorted({_steps(text) for text in arguments.num_steps})
        lengths = {size: steps for size in sizes}
    else:
        epochs = [_positive("epochs", text) for text in arguments.epochs or _EPOCHS]
        lengths = {size: budget.steps_of(size, epochs) for size in sizes}
    return [budget.plan(size, n) for size in sorted(lengths) for n in lengths[size]]


def _steps(text: str) -> int:
    """Returns a number of steps of which something can be said."""
    count = as_count("num_steps", text)
    if count < 1:
        rule = "must be at least 1"
        raise ConfigError(fault("num_steps", count, rule, "count updates"))
    return count


def _report(
    budget: Budget, runs: Sequence[PlannedRun]
) -> dict[str, float | int | str | list[dict[str, float]]]:
    """Returns all that was asked and answered."""
    return {
        "target_epsilon": budget.target_epsilon,
        "delta": budget.delta,
        "num_examples": budget.num_examples,
        "clipping_norm": budget.clipping_norm,
        "accountant": budget.accountant.name,
        "runs": [asdict(run) for run in runs],
    }


def _table(budget: Budget, runs: Sequence[PlannedRun]) -> Table:
    """Returns a table of a section for each batch size."""
    title = (
        f"({budget.target_epsilon:g}, {budget.delta:g})-DP, {budget.num_examples:,} "
        f"examples, clipping norm {budget.clipping_norm:g}; every row is certified "
        f"by {budget.accountant.name}"
    )
    table = Table(title=title, title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for _, group in groupby(runs, key=lambda run: run.expected_batch_size):
        for run in group:
            table.add_row(
                f"{run.expected_batch_size:,g}",
                f"{run.num_steps:,}",
                f"{run.epochs:,.4g}",
                f"{run.examples_processed:.3g}",
                f"{run.noise_multiplier:.6f}",
                f"{run.noise_per_coordinate:.3e}",
                rounded_up(run.epsilon),
            )
        table.add_section()
    return table
