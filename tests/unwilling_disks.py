"""Disks that are full, and places that are locked even to root."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def lock(monkeypatch: pytest.MonkeyPatch, place: Path, method: str) -> None:
    """Has a method of `Path` refused at a place and below it."""
    own = getattr(Path, method)

    def locked(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.is_relative_to(place):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return own(path, *arguments, **options)

    monkeypatch.setattr(Path, method, locked)
