"""What a person is told when something they gave us cannot be used.

Every message follows one pattern, `field=value: rule; remedy`, so that the
reader sees what was given, why it is refused and what to do about it.
"""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = [
    "BudgetExceededError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "RankError",
    "UserError",
    "did_you_mean",
    "fault",
    "is_full",
    "readable",
    "writable",
]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A fault that the person who started the run can mend."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """A data set that is missing, damaged, or unlike what was declared."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign, or could not be written."""


class RankError(UserError):
    """Another process of the same run was lost."""


class BudgetExceededError(UserError):
    """A step that would spend more privacy than was granted."""


def fault(field: str, value: object, rule: str, remedy: str) -> str:
    """Returns the message `field=value: rule; remedy`.

    >>> fault("privacy.delta", 0.1, "must be below 1/num_examples", "lower it")
    'privacy.delta=0.1: must be below 1/num_examples; lower it'
    """
    shown = "null" if value is None else value
    return f"{field}={shown}: {rule}; {remedy}"


def did_you_mean(
    name: object, known: Iterable[str], *, otherwise: str, prefix: str = ""
) -> str:
    """Returns the remedy for a name that is not known: the nearest that is.

    Args:
        name: What was given.
        known: Names that there are.
        otherwise: The remedy where none of them is near.
        prefix: What stands before the names in the message.

    >>> did_you_mean("lnear", ["linear", "cosine"], otherwise="choose one")
    'did you mean `linear`?'
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"did you mean `{prefix}{near[0]}`?" if near else otherwise


@contextmanager
def readable(field: str, path: Path) -> Iterator[None]:
    """Turns what a file or folder raises that may not be read into a UserError.

    Args:
        field: What named it.
        path: The file or folder.

    Raises:
        UserError: The system refuses to read it.
    """
    try:
        yield
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise UserError(fault(field, path, rule, "give access to it")) from error


@contextmanager
def writable(
    field: str, path: Path, *, remedy: str, kind: type[UserError] = ConfigError
) -> Iterator[None]:
    """Turns what a place raises that is full, or may not be written, into a UserError.

    Args:
        field: What named it.
        path: The file or folder.
        remedy: What to do about it.
        kind: Of the error.

    Raises:
        UserError: The system refuses to write there.
    """
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise kind(fault(field, path, rule, remedy)) from error


def is_full(error: OSError) -> bool:
    """Returns whether a write failed for want of room, on the disk or by a limit."""
    return error.errno in _FULL
