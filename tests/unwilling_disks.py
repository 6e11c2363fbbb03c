"""Disks that are full, and places that are locked even to root."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can have more bytes than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(*_arguments: Any, **_options: Any) -> NoReturn:
    """Stands in for a call that needs a permission that is not given."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def lock(monkeypatch: pytest.MonkeyPatch, place: Path, method: str) -> None:
    """Has a method of `Path` refused at a place and below it."""
    own = getattr(Path, method)

    def locked(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.is_relative_to(place):
            refused()
        return own(path, *arguments, **options)

    monkeypatch.setattr(Path, method, locked)
