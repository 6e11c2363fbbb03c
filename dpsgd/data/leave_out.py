"""A public set once more, without some of its images.

All else stays: names of files, their columns, row groups, compression and metadata,
and the order of the images. Images of class folders are copied, not linked: the new
set stays what it is when the old one is moved or changed, as parquet files do. A set
that could be compared fits into memory, so that copies are no burden.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd.data.new_folder import new_folder, told_of_writing
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
    _check_outside(source, folder)
    told = told_of_writing(folder, field=_FIELD)
    with new_folder(folder, field=_FIELD) as partial, told:
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


def _check_outside(source: ImageSource, folder: Path) -> None:
    """Raises if a folder would become a part of the set."""
    # Parquet files of one folder are found beside each other, not deeper.
    is_deep = any(path.parent != source.root for path in source.files)
    if is_deep and folder.resolve().is_relative_to(source.root.resolve()):
        rule = "lies inside PUBLIC, and would be taken for a part of it"
        raise DataError(fault(_FIELD, folder, rule, "name a folder outside"))


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
