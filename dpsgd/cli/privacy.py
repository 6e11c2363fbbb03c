"""`dpsgd-privacy`: the epsilon of a run, or the noise or steps an epsilon allows."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.errors import ConfigError, fault
from dpsgd.privacy import (
    Accountant,
    EpsilonBound,
    Phase,
    build_accountant,
    calibrate_noise_multiplier,
    calibrate_num_steps,
    rounded_up,
)
from dpsgd.privacy.mechanism import check_delta, check_sample_rate

__all__ = ["main"]

_EPILOG: Final = """\
Neighbouring data sets differ by one example, added or removed; batches are Poisson
samples. epsilon_upper is certified: it is the figure to promise. In JSON an infinite
epsilon (no noise) is the string "inf". Exit code 2: the input cannot be used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, or 2 if the input cannot be used, which one line on stderr tells.
    """
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    """Answers, as JSON or as a table."""
    report = _report(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    """Describes the command line; numbers stay text, so that faults read alike."""
    parser = UsageParser(
        prog="dpsgd-privacy",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    epsilon = _command(commands, "epsilon", "the epsilon that a run spends")
    epsilon.add_argument("--noise-multiplier", required=True, metavar="SIGMA")
    epsilon.add_argument("--num-steps", required=True, metavar="T")
    calibrate = _command(
        commands, "calibrate", "the least noise, or the most steps, for an epsilon"
    )
    calibrate.add_argument("--target-epsilon", required=True, metavar="EPSILON")
    wanted = calibrate.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--num-steps", metavar="T", help="find the noise multiplier")
    wanted.add_argument("--noise-multiplier", metavar="SIGMA", help="find the steps")
    return parser


def _command(
    commands: "argparse._SubParsersAction[UsageParser]", name: str, summary: str
) -> UsageParser:
    """Adds a command with the options that both have."""
    command = commands.add_parser(
        name,
        help=summary,
        description=f"Tells {summary}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "--sample-rate", metavar="Q", help="in (0, 1]; or the next two"
    )
    command.add_argument("--expected-batch-size", metavar="B", help="in examples")
    command.add_argument("--num-examples", metavar="N", help="size of the training set")
    command.add_argument("--delta", required=True, metavar="DELTA", help="below 1/N")
    command.add_argument("--accountant", default="prv", help="default: prv")
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _report(arguments: argparse.Namespace) -> dict[str, float | int | str]:
    """Returns what is asked for, with everything it depends on."""
    accountant = build_accountant(arguments.accountant)
    sample_rate = _sample_rate(arguments)
    delta = _number(arguments, "delta")
    check_delta(delta)
    if arguments.command == "epsilon":
        noise_multiplier = _number(arguments, "noise_multiplier")
        num_steps = _count(arguments, "num_steps")
    else:
        noise_multiplier, num_steps = _calibrated(
            arguments, sample_rate, delta, accountant
        )
    phase = Phase(sample_rate, noise_multiplier, num_steps)
    bound = accountant.epsilon([phase], delta)
    return {
        **_bounds(bound),
        "noise_multiplier": noise_multiplier,
        "num_steps": num_steps,
        "sample_rate": sample_rate,
        "delta": delta,
        "accountant": arguments.accountant,
    }


def _calibrated(
    arguments: argparse.Namespace,
    sample_rate: float,
    delta: float,
    accountant: Accountant,
) -> tuple[float, int]:
    """Returns noise multiplier and steps, of which one is given and one is found."""
    target_epsilon = _number(arguments, "target_epsilon")
    if arguments.num_steps is None:
        noise_multiplier = _number(arguments, "noise_multiplier")
        num_steps = calibrate_num_steps(
            target_epsilon=target_epsilon,
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            delta=delta,
            accountant=accountant,
        )
        if num_steps == 0:
            rule = "is less than a single step spends"
            remedy = "raise it, or raise noise_multiplier"
            print(
                fault("target_epsilon", target_epsilon, rule, remedy), file=sys.stderr
            )
        return noise_multiplier, num_steps
    num_steps = _count(arguments, "num_steps")
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=target_epsilon,
        sample_rate=sample_rate,
        num_steps=num_steps,
        delta=delta,
        accountant=accountant,
    )
    return noise_multiplier, num_steps


def _sample_rate(arguments: argparse.Namespace) -> float:
    """Returns the sampling probability, given as it is or as two sizes."""
    sizes = (arguments.expected_batch_size, arguments.num_examples)
    if arguments.sample_rate is not None:
        if sizes != (None, None):
            rule = "is given twice: by itself and by sizes"
            raise ConfigError(
                fault("sample_rate", arguments.sample_rate, rule, "give it once")
            )
        sample_rate = _number(arguments, "sample_rate")
    elif None in sizes:
        remedy = "give --sample-rate, or --expected-batch-size and --num-examples"
        raise ConfigError(fault("sample_rate", None, "is needed", remedy))
    else:
        num_examples = _count(arguments, "num_examples")
        if num_examples < 1:
            rule = "must be at least 1"
            raise ConfigError(
                fault(
                    "num_examples", num_examples, rule, "give the training set's size"
                )
            )
        sample_rate = _number(arguments, "expected_batch_size") / num_examples
    check_sample_rate(sample_rate)
    return sample_rate


def _number(arguments: argparse.Namespace, field: str) -> float:
    """Returns an argument as a number."""
    text = getattr(arguments, field)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            fault(field, text, "must be a number", "write it like 0.5 or 1e-5")
        ) from None


def _count(arguments: argparse.Namespace, field: str) -> int:
    """Returns an argument as a whole number."""
    text = getattr(arguments, field)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            fault(field, text, "must be a whole number", "write it like 1000")
        ) from None


def _bounds(bound: EpsilonBound) -> dict[str, float | int | str]:
    """Returns the three epsilons under their names, with infinity as text."""
    values = {
        "epsilon_lower": bound.lower,
        "epsilon_estimate": bound.estimate,
        "epsilon_upper": bound.upper,
    }
    return {
        name: "inf" if math.isinf(value) else value for name, value in values.items()
    }


def _show(report: dict[str, float | int | str]) -> None:
    """Prints the report as a table."""
    table = Table(show_header=False)
    for name, value in report.items():
        shown = f"{value:.7g}" if isinstance(value, float) else str(value)
        if name == "epsilon_upper" and isinstance(value, float):
            shown = rounded_up(value, 6)
        style = "bold" if name == "epsilon_upper" else ""
        table.add_row(name, shown, style=style)
    Console().print(table)
