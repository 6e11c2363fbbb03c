"""From faults to exit codes: one clear line each on stderr, never a traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from dpsgd.errors import ConfigError, UserError

__all__ = ["Commands", "UsageParser", "exit_code"]

_USER_FAULT = 2
_INTERRUPTED = 130

Commands = argparse._SubParsersAction
"""What subcommands are added to; argparse gives it no public name."""


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; a fault that its user can mend is told on stderr, with code 2.

    Any other exception is a defect of ours, and keeps its traceback.
    """
    try:
        return command()
    except UserError as error:
        for line in str(error).splitlines():
            print(line, file=sys.stderr)
        return _USER_FAULT
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before or after training, which handles its own
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


class UsageParser(argparse.ArgumentParser):
    """An argument parser whose complaints look like every other."""

    def add_overrides(self) -> None:
        """Adds `--set section.key=value`, collected in `overrides`."""
        self.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="section.key=value",
            help="replace a setting; may be repeated",
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError in place of printing the usage and exiting."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")
