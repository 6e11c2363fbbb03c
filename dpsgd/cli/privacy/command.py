"""The command line of `bin/dpsgd-privacy`, which hands over to a subcommand."""

import argparse
from collections.abc import Sequence
from typing import Final

from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.cli.privacy import account, compare, plan
from dpsgd.cli.privacy.options import EPILOG

__all__ = ["main"]

_DESCRIPTION: Final = """\
The epsilon of a run, the noise or steps an epsilon allows, every account of the same
run side by side, and how budget, noise and batch size interact.
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
    """Runs the subcommand that was chosen."""
    arguments.run(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    """Describes the command line; numbers stay text, so that faults read alike."""
    parser = UsageParser(
        prog="dpsgd-privacy",
        description=_DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for subcommand in (account, compare, plan):
        subcommand.add_to(commands)
    return parser
