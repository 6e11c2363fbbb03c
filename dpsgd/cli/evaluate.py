"""`bin/dpsgd-eval`: measures the weights of a run on its test set."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dpsgd.assembly import evaluator, load_network
from dpsgd.checkpoint import CheckpointStore, read_tensors
from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.config import load_config
from dpsgd.data import load_datasets
from dpsgd.errors import ConfigError, fault
from dpsgd.planning import choose_device
from dpsgd.report import RunDirectory, per_class_table, result_table, to_json
from dpsgd.trees import Params

__all__ = ["main"]

_PREFIXES = {"last": ("last/", "params/"), "ema": ("ema/", "ema/")}


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
        choices=list(_PREFIXES),
        help="default: the average if the run keeps one, else the last",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_overrides()
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    directory = RunDirectory(arguments.run_dir)
    directory.require()
    config = load_config(directory.config, arguments.overrides)
    weights = arguments.weights or ("last" if config.ema.decay is None else "ema")
    params, step = _read_weights(directory, weights)
    splits = load_datasets(config.data)
    device = choose_device(config.runtime.device)
    model, names = load_network(config, splits, params, device)
    measure = evaluator(config, splits, model, names, device)
    result = measure({name: leaf.to(device) for name, leaf in params.items()})
    if arguments.json:
        facts = {"weights": weights, "step": step, "largest_gap": result.largest_gap}
        print(to_json({**facts, **asdict(result)}, indent=2))
        return 0
    console = Console(markup=False, emoji=False)  # classes may be [named so]
    console.print(per_class_table(result.per_class_accuracy))
    console.print(result_table({weights: result.measures}, title=f"After {step} steps"))
    return 0


def _read_weights(directory: RunDirectory, weights: str) -> tuple[Params, int]:
    """Returns the weights of a finished run, or of the newest checkpoint."""
    finished, running = _PREFIXES[weights]
    if directory.weights.exists():
        tensors, facts = read_tensors(directory.weights)
        prefix = finished
    else:
        checkpoint = CheckpointStore(directory.checkpoints, keep=1).newest()
        tensors, facts = checkpoint.tensors, checkpoint.facts
        prefix = running
    params = {
        name.removeprefix(prefix): leaf
        for name, leaf in tensors.items()
        if name.startswith(prefix)
    }
    if not params:
        rule = "the run kept no such weights"
        raise ConfigError(fault("--weights", weights, rule, "take the other kind"))
    return params, facts["step"]
