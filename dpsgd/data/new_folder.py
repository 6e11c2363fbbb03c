"""A folder that is written whole or not at all, and only where none is."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpsgd.errors import DataError, fault, is_full

__all__ = ["new_folder", "told_of_writing"]


@contextmanager
def new_folder(folder: Path, *, field: str) -> Iterator[Path]:
    """Yields a folder that is renamed when all is written, and removed if not.

    It is made before anything is written or computed, so that a place where it cannot
    be is told at once. What the body raises is left as it is.

    Args:
        folder: Where it is in the end; its parents are made.
        field: What names it, for messages.

    Raises:
        DataError: The folder is there, or was begun; the disk is full or refuses.
    """
    with told_of_writing(folder, field=field):
        partial = _partial(folder, field)
        parents = [path for path in partial.parents if not path.exists()]
        partial.mkdir(parents=True)
    try:
        yield partial
        with told_of_writing(folder, field=field):
            os.sync()  # or a crash might leave the name without what it names
            partial.rename(folder)
    except BaseException:
        # A file that will not go must not hide what happened.
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for path in parents:
                path.rmdir()
        raise


@contextmanager
def told_of_writing(folder: Path, *, field: str) -> Iterator[None]:
    """Turns what a full or locked disk raises into a DataError.

    Args:
        folder: What is written, under the name that it has in the end.
        field: What names it, for messages.
    """
    try:
        yield
    except OSError as error:
        full = is_full(error)
        reason = os.strerror(error.errno) if error.errno else str(error)
        rule = "the disk is full" if full else f"cannot be written ({reason})"
        remedy = "make room" if full else "give access to it"
        remedy += ", or name a folder elsewhere; nothing was left"
        raise DataError(fault(field, folder, rule, remedy)) from error


def _partial(folder: Path, field: str) -> Path:
    """Returns the name that a folder has until it is whole; raises if one is there."""
    if os.path.lexists(folder):
        rule = "is there already, and nothing is overwritten"
        raise DataError(fault(field, folder, rule, "name another folder"))
    partial = folder.with_name(f"{folder.name}.part")
    if os.path.lexists(partial):
        rule = f"was begun in {partial}, which is still written or was left half done"
        raise DataError(fault(field, folder, rule, "remove that, or name another"))
    return partial
