"""`bin/dpsgd-eval`: measures the weights of a run on its test set."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dpsgd.assembly import load_network
from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.cli.groups import comparisons
from dpsgd.config import Config, load_config
from dpsgd.data import DataSplits, load_datasets
from dpsgd.evaluate import Evaluation, evaluator
from dpsgd.passes import choose_device
from dpsgd.report import (
    RunDirectory,
    comparison_table,
    guarantee_in_words,
    result_table,
    to_json,
)
from dpsgd.weights import run_weights

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """One run, measured; `facts` are those that its weights came with."""

    path: Path
    weights: str
    facts: Mapping[str, Any]
    result: Evaluation

    @property
    def guarantee(self) -> str:
        """What is guaranteed of the weights."""
        if "epsilon" in self.facts:
            return guarantee_in_words(self.facts)
        return "not finished, guarantee not stated yet"

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON says of the run."""
        return {
            "run": str(self.path),
            "weights": self.weights,
            "step": self.facts["step"],
            "guarantee": self.guarantee,
            "largest_gap": self.result.largest_gap,
            **asdict(self.result),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0, or 2 when something given is at fault.
    """
    return exit_code(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = UsageParser(
        prog="dpsgd-eval",
        description="Measure the weights of a run on its public test set.",
    )
    parser.add_argument("run_dir", type=Path, help="folder that bin/dpsgd-train made")
    parser.add_argument(
        "--weights",
        choices=["last", "ema"],
        help="default: the average if the run keeps one, else the last",
    )
    parser.add_argument(
        "--twin",
        type=Path,
        metavar="DIR",
        help="a run without privacy, measured on the same examples, to compare with",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_overrides()
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    config = _config(arguments.run_dir, arguments.overrides)
    splits = load_datasets(config.data)
    mine = _measure(arguments.run_dir, config, splits, arguments.weights)
    twin = None
    if arguments.twin is not None:
        settings = _config(arguments.twin, arguments.overrides)
        twin = _measure(
            arguments.twin, settings, splits, arguments.weights, name="twin"
        )
    if arguments.json:
        print(to_json(_facts(config, mine, twin), indent=2))
    else:
        _show(config, mine, twin)
    return 0


def _config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """Returns the settings of a run."""
    directory = RunDirectory(run_dir)
    directory.require()
    return load_config(directory.config, overrides, has_begun=True)


def _measure(
    run_dir: Path,
    config: Config,
    splits: DataSplits,
    weights: str | None,
    *,
    name: str = "weights",
) -> _Measured:
    """Measures one run on a test set."""
    weights = weights or ("last" if config.ema.decay is None else "ema")
    params, facts = run_weights(RunDirectory(run_dir), weights, field="--weights")
    device = choose_device(config.runtime.device)
    model, names = load_network(config, splits, params, device, name=name)
    measure = evaluator(config, splits, model, names, device)
    result = measure({name: leaf.to(device) for name, leaf in params.items()})
    return _Measured(path=run_dir, weights=weights, facts=facts, result=result)


def _facts(config: Config, mine: _Measured, twin: _Measured | None) -> dict[str, Any]:
    """Returns what JSON says."""
    other = twin.result if twin is not None else None
    compared = comparisons(mine.result, config, twin=other)
    facts = {**mine.to_dict(), "outcomes": [one.to_dict() for one in compared]}
    return facts if twin is None else {**facts, "twin": twin.to_dict()}


def _show(config: Config, mine: _Measured, twin: _Measured | None) -> None:
    """Prints tables."""
    console = Console(markup=False, emoji=False)  # classes may be [named so]
    other = twin.result if twin is not None else None
    for one in comparisons(mine.result, config, twin=other):
        console.print(comparison_table(one))
    results = {mine.weights: mine.result.measures}
    told = [f"{mine.path}: {mine.guarantee}"]
    if twin is not None:
        results[f"twin ({twin.weights})"] = twin.result.measures
        told.append(f"twin {twin.path}: {twin.guarantee}")
    step = mine.facts["step"]
    console.print(f"After {step} step{'' if step == 1 else 's'}", style="italic")
    console.print(result_table(results))
    for line in told:
        console.print(line, highlight=False, soft_wrap=True)
