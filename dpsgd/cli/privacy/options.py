"""Options that subcommands share, and how their text becomes numbers."""

import argparse
import math
from typing import Final

from dpsgd.cli.errors import Commands, UsageParser
from dpsgd.errors import ConfigError, fault
from dpsgd.privacy import ACCOUNTANTS
from dpsgd.privacy.mechanism import check_delta, check_sample_rate

__all__ = [
    "EPILOG",
    "Commands",
    "add_accountant",
    "add_command",
    "add_sampling",
    "as_count",
    "as_number",
    "delta_of",
    "json_number",
    "num_examples_of",
    "sample_rate_of",
]

EPILOG: Final = """\
Neighbouring data sets differ by one example, added or removed; batches are Poisson
samples. epsilon_upper is certified: it is the figure to promise. In JSON an infinite
epsilon (no noise) is the string "inf". Exit code 2: the input cannot be used.
"""


def add_command(
    commands: "Commands[UsageParser]", name: str, summary: str
) -> UsageParser:
    """Adds a subcommand with `--json`.

    Args:
        commands: What it is added to.
        name: Its name.
        summary: What it tells, without a full stop.
    """
    command = commands.add_parser(
        name,
        help=summary,
        description=f"Tells {summary}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def add_sampling(command: UsageParser, *, required: bool = True) -> None:
    """Adds the sampling rate, as it is or as two sizes, and delta.

    Args:
        command: What they are added to.
        required: Whether delta must be given.
    """
    command.add_argument(
        "--sample-rate", metavar="Q", help="in (0, 1]; or the next two"
    )
    command.add_argument("--expected-batch-size", metavar="B", help="in examples")
    command.add_argument("--num-examples", metavar="N", help="size of the training set")
    command.add_argument(
        "--delta", required=required, metavar="DELTA", help="below 1/N"
    )


def add_accountant(command: UsageParser, *, default: str) -> None:
    """Adds the accountant.

    Args:
        command: What it is added to.
        default: Its name if none is given.
    """
    *others, last = ACCOUNTANTS
    known = f"{', '.join(others)} or {last}"
    command.add_argument(
        "--accountant", default=default, help=f"{known}; default: {default}"
    )


def as_number(field: str, text: str) -> float:
    """Returns an argument as a number.

    Args:
        field: Its name, for the message.
        text: What was given.

    Raises:
        ConfigError: It is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            fault(field, text, "must be a number", "write it like 0.5 or 1e-5")
        ) from None


def as_count(field: str, text: str) -> int:
    """Returns an argument as a whole number.

    Args:
        field: Its name, for the message.
        text: What was given.

    Raises:
        ConfigError: It is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            fault(field, text, "must be a whole number", "write it like 1000")
        ) from None


def delta_of(arguments: argparse.Namespace) -> float:
    """Returns delta.

    Args:
        arguments: With `delta`.

    Raises:
        ConfigError: It is out of range.
    """
    delta = as_number("delta", arguments.delta)
    check_delta(delta)
    return delta


def num_examples_of(arguments: argparse.Namespace) -> int:
    """Returns the size of the training set.

    Args:
        arguments: With `num_examples`.

    Raises:
        ConfigError: It is no positive whole number.
    """
    num_examples = as_count("num_examples", arguments.num_examples)
    if num_examples < 1:
        remedy = "give the training set's size"
        raise ConfigError(
            fault("num_examples", num_examples, "must be at least 1", remedy)
        )
    return num_examples


def sample_rate_of(arguments: argparse.Namespace) -> float:
    """Returns the sample rate, given as it is or as two sizes.

    Args:
        arguments: With what `add_sampling` added.

    Raises:
        ConfigError: It is missing, given twice, or out of range.
    """
    sizes = (arguments.expected_batch_size, arguments.num_examples)
    if arguments.sample_rate is not None:
        if sizes != (None, None):
            rule = "is given twice: by itself and by sizes"
            raise ConfigError(
                fault("sample_rate", arguments.sample_rate, rule, "give it once")
            )
        sample_rate = as_number("sample_rate", arguments.sample_rate)
    elif None in sizes:
        remedy = "give --sample-rate, or --expected-batch-size and --num-examples"
        raise ConfigError(fault("sample_rate", None, "is needed", remedy))
    else:
        batch_size = as_number("expected_batch_size", arguments.expected_batch_size)
        sample_rate = batch_size / num_examples_of(arguments)
    check_sample_rate(sample_rate)
    return sample_rate


def json_number(value: float | None) -> float | str | None:
    """Returns a number as JSON can hold it: infinity as text.

    Args:
        value: Number, or None, which stays.
    """
    return "inf" if value is not None and math.isinf(value) else value
