"""The command line of `bin/dpsgd-data`, which hands over to a subcommand."""

import argparse
from collections.abc import Sequence

from dpsgd.cli.data import leave_out, overlap
from dpsgd.cli.errors import UsageParser, exit_code

__all__ = ["main"]

_DESCRIPTION = "What to know of data before they are trained on."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0, or 2 when something given is at fault.
    """
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand that was chosen."""
    arguments.run(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = UsageParser(prog="dpsgd-data", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    for subcommand in (overlap, leave_out):
        subcommand.add_to(commands)
    return parser
