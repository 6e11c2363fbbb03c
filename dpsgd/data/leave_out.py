"""A public set once more, without some of its images.

All else stays: names of files, their columns, row groups, compression and metadata,
and the order of the images. Images of class folders are copied, not linked: the new
set stays what it is when the old one is moved or changed, as parquet files do. A set
that could be compared fits into memory, so that copies are no burden.
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd.data.parquet import reading
from dpsgd.data.store.sources import ImageSource
from dpsgd.errors import DataError, fault

__all__ = ["NOTE", "leave_out"]

NOTE = "left_out.json"
"""File beside the images that says what was left out."""
_FIELD = "--out"


def leave_out(
    source: ImageSource, rows: Collection[int], folder: Path, *, note: Mapping[str, Any]
) -> None:
    """Writes all images of a set but some, in a folder that is new.

    One row group or image is held at a time. The folder has another name until all is
    written, so that none is there that looks whole and is not.

    Args:
        source: The set.
        rows: Rows that are left out, counted over all files from 0.
        folder: Where it is written; its parents are made.
        note: What `left_out.json` says.

    Raises:
        DataError: The folder is there, or lies inside the set; nothing would remain of
            the set, or of a class folder; the disk is full or refuses, after which
            nothing is left; or a file of the set cannot be read.
    """
    kept = np.ones(len(source), np.bool_)
    kept[list(rows)] = False
    _check_remains(source, kept)
    _check_new(source, folder)
    with _whole(folder) as partial:
        copy = _copy_images if source.is_folder else _copy_parquet
        copy(source, kept, partial)
        (partial / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


def _check_remains(source: ImageSource, kept: NDArray[np.bool_]) -> None:
    """Raises where a set is not one without the images, or has other labels."""
    remedy = "keep some pairs with --keep"
    if not kept.any():
        rule = "would hold no image: all are to be left out"
        raise DataError(fault("PUBLIC", source.root, rule, remedy))
    gone = set(source.labels) - set(source.labels[kept])
    # Parquet files declare their classes; folders do by having images.
    if source.is_folder and gone:
        name = source.class_names[min(gone)]
        rule = f"would lose its class `{name}`, and later ones would change labels"
        raise DataError(fault("PUBLIC", source.root, rule, remedy))


def _check_new(source: ImageSource, folder: Path) -> None:
    """Raises if writing a folder would change something that is there."""
    partial = _partial(folder)
    if os.path.lexists(folder):
        rule = "is there already, and nothing is overwritten"
        raise DataError(fault(_FIELD, folder, rule, "name another folder"))
    if os.path.lexists(partial):
        rule = f"was begun in {partial}, which is still written or was left half done"
        raise DataError(fault(_FIELD, folder, rule, "remove that, or name another"))
    # Parquet files of one folder are found beside each other, not deeper.
    is_deep = any(path.parent != source.root for path in source.files)
    if is_deep and folder.resolve().is_relative_to(source.root.resolve()):
        rule = "lies inside PUBLIC, and would be taken for a part of it"
        raise DataError(fault(_FIELD, folder, rule, "name a folder outside"))


def _partial(folder: Path) -> Path:
    """Returns the name that a folder has until it is whole."""
    return folder.with_name(f"{folder.name}.part")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yields a folder that is renamed when all is written, and removed if not."""
    partial = _partial(folder)
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            os.sync()  # or a crash might leave the name without what it names
            partial.rename(folder)
        except BaseException:
            # A file that will not go must not hide what happened.
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what a full or locked disk raises into a DataError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = os.strerror(error.errno) if error.errno else str(error)
        rule = "the disk is full" if full else f"cannot be written ({reason})"
        remedy = "make room" if full else "give access to it"
        remedy += ", or name a folder elsewhere; nothing was left"
        raise DataError(fault(_FIELD, folder, rule, remedy)) from error


def _copy_images(source: ImageSource, kept: NDArray[np.bool_], folder: Path) -> None:
    """Copies image files, at the same places below the root."""
    for path, image, keep in zip(source.files, source.encoded(0), kept, strict=True):
        if keep:
            target = folder / path.relative_to(source.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image.content())


def _copy_parquet(source: ImageSource, kept: NDArray[np.bool_], folder: Path) -> None:
    """Copies parquet files, at the same places below the folder that holds them all."""
    start = 0
    for path in source.files:
        target = folder / path.relative_to(source.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        start += _copy_rows(path, target, kept[start:])


def _copy_rows(path: Path, target: Path, kept: NDArray[np.bool_]) -> int:
    """Copies the rows of one file that are kept; returns how many there were."""
    import pyarrow as pa
    import pyarrow.parquet

    with reading("PUBLIC", path):
        file = pa.parquet.ParquetFile(path)
    start = 0
    with pa.parquet.ParquetWriter(
        target, file.schema_arrow, compression=_compression(file.metadata)
    ) as writer:
        for group in range(file.num_row_groups):
            with reading("PUBLIC", path):
                table = file.read_row_group(group)
            part = table.filter(pa.array(kept[start : start + len(table)]))
            if len(part):
                writer.write_table(part, row_group_size=len(part))
            start += len(table)
    return start


def _compression(metadata: Any) -> dict[str, str]:
    """Returns the codec of each column of a file, as its first row group has it."""
    if metadata.num_row_groups == 0:
        return {}
    group = metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    # Files and writers name the lack of one differently.
    return {
        column.path_in_schema: column.compression.replace("UNCOMPRESSED", "NONE")
        for column in columns
    }
