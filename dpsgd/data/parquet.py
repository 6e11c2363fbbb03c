"""Parquet files in the Hugging Face image convention: encoded images and labels.

The image column is a struct of `bytes` and `path`, or plain binary; the label column
holds integers. Class names come from the ClassLabel feature in the file's metadata.
A training file may also say in a column to which user each example belongs, a test
file to which group, by which accuracy is told.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data.dataset import DataSplits, ImageDataset
from dpsgd.data.files import EncodedImage, decode_images, resolve, resolve_splits
from dpsgd.data.labels import check_labels
from dpsgd.errors import ConfigError, DataError, fault

__all__ = ["ParquetImages", "load_parquet", "load_parquet_images", "reading"]

_ROWS_PER_READ = 1024
_KINDS = {
    "image_column": "image bytes",
    "label_column": "integers",
    "user_column": "integers or text",
    "group_column": "integers, text or booleans",
}
_NO_GROUP = "(missing)"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """Where a file keeps what; no class names if it declares none."""

    image: str
    label: str
    user: str | None
    group: str | None
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """One opened file of a split; `field` is the setting that named it."""

    field: str
    path: Path
    file: Any
    columns: _Columns

    def fault(self, row: int, rule: str, remedy: str) -> DataError:
        """Returns the error that names a row, counted from 0."""
        return DataError(fault(self.field, _place(self.path, row), rule, remedy))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetImages:
    """The images of files that are built alike, none decoded yet.

    Attributes:
        labels: (N,) int64, each checked against the declared classes.
        class_names: () if the files declare none.
        paths: The files, in order.
    """

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    _shards: tuple[_Shard, ...]

    @classmethod
    def of(cls, field: str, paths: list[Path], config: DataConfig) -> "ParquetImages":
        """Opens files, whose columns `config` names if their types do not tell.

        Raises:
            UserError: As for `load_parquet`, but that nothing is decoded.
        """
        shards = _open_shards(field, paths, config)
        return cls(
            labels=np.concatenate([_read_labels(shard) for shard in shards]),
            class_names=shards[0].columns.class_names,
            paths=tuple(paths),
            _shards=tuple(shards),
        )

    def encoded(self, start: int) -> Iterator[EncodedImage]:
        """Yields the images from row `start` on, counted over all files."""
        for shard in self._shards:
            num_rows = shard.file.metadata.num_rows
            if start < num_rows:
                yield from islice(_encoded_images(shard), start, None)
            start = max(0, start - num_rows)


def load_parquet(config: DataConfig) -> DataSplits:
    """Loads `data.train` and `data.test` from parquet files.

    Each is a file, a list of files, a glob, or a folder of shards (sorted by name).
    Columns are found by type unless `data.image_column` or `data.label_column` names
    them. Without declared classes, `class_names` is () and the model's configuration
    must state their number. `data.user_column` is read from the training files alone,
    `data.group_column` from the test files alone.

    Args:
        config: The section `data`.

    Raises:
        ConfigError: A path is not given, or a column is ambiguous or not there.
        DataError: A file, image or label is missing, damaged or unlike the others;
            the message names the file and the row, counted from 0.
    """
    train_paths, test_paths = resolve_splits(config, shard_suffix=".parquet")
    train = _open_shards("data.train", train_paths, config)
    test = _open_shards("data.test", test_paths, config)
    return DataSplits(train=_load_split(train), test=_load_split(test))


def _open_shards(field: str, paths: list[Path], config: DataConfig) -> list[_Shard]:
    """Opens the files of a split, which must all be built alike."""
    shards = [_open_shard(field, path, config) for path in paths]
    for shard in shards:
        if shard.columns != shards[0].columns:
            message = fault(
                field,
                shard.path,
                f"has other columns or classes than {paths[0]}",
                "name files of one data set only",
            )
            raise DataError(message)
    return shards


def _open_shard(field: str, path: Path, config: DataConfig) -> _Shard:
    """Opens one file and finds its columns, reading no rows yet."""
    import pyarrow.parquet

    with reading(field, path):
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
    columns = _find_columns(schema, path, config, is_train=field == "data.train")
    return _Shard(field=field, path=path, file=file, columns=columns)


def _load_split(shards: list[_Shard]) -> ImageDataset:
    """Reads all rows of a split, labels first because they are checked quickly."""
    labels = np.concatenate([_read_labels(shard) for shard in shards])
    if len(labels) == 0:
        message = fault(
            shards[0].field, shards[0].path, "holds no rows", "name files with images"
        )
        raise DataError(message)
    users, groups = None, None
    group_names: tuple[str, ...] = ()
    if shards[0].columns.user is not None:
        users = _number_users([user for one in shards for user in _read_users(one)])
    if shards[0].columns.group is not None:
        groups, group_names = _read_groups(shards)
    encoded = (image for shard in shards for image in _encoded_images(shard))
    return ImageDataset(
        images=decode_images(encoded, len(labels)),
        labels=torch.from_numpy(labels),
        class_names=shards[0].columns.class_names,
        users=users,
        groups=groups,
        group_names=group_names,
    )


def _read_labels(shard: _Shard) -> NDArray[np.int64]:
    """Returns the labels of one file, each checked against the declared classes."""
    import pyarrow as pa

    with reading(shard.field, shard.path):
        column = shard.file.read(columns=[shard.columns.label]).column(0)
        column = column.cast(pa.int64())
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise shard.fault(row, "has no label", "label the row or remove it")
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    check_labels(
        labels,
        len(shard.columns.class_names),
        field=shard.field,
        place=partial(_place, shard.path),
        remedy="correct the label, or the classes in the file's metadata",
    )
    return labels


def _read_users(shard: _Shard) -> list[str]:
    """Returns the user of every row of one file, as text whatever the column's type."""
    import pyarrow as pa

    with reading(shard.field, shard.path):
        column = shard.file.read(columns=[shard.columns.user]).column(0)
        users: list[str | None] = column.cast(pa.string()).to_pylist()
    for row, user in enumerate(users):
        if not user:
            # Rows of unknown users are not one user, and not one user each either.
            rule = "has no user, and the guarantee is per user"
            raise shard.fault(row, rule, "name the row's user or remove the row")
    return [user for user in users if user]


def _number_users(users: list[str]) -> Tensor:
    """Returns users as numbers from 0, in the order in which they first occur."""
    numbers = {user: number for number, user in enumerate(dict.fromkeys(users))}
    return torch.tensor([numbers[user] for user in users])


def _read_groups(shards: list[_Shard]) -> tuple[Tensor, tuple[str, ...]]:
    """Returns the group of every row of a split, and the groups' sorted names."""
    values: list[Any] = []
    for shard in shards:
        with reading(shard.field, shard.path):
            values += (
                shard.file.read(columns=[shard.columns.group]).column(0).to_pylist()
            )
    known = sorted({one for one in values if one is not None}, key=_number_or_text)
    names = {value: str(value) for value in known}
    if None in values:
        names[None] = _NO_GROUP
    numbers = {
        name: number for number, name in enumerate(dict.fromkeys(names.values()))
    }
    groups = torch.tensor([numbers[names[value]] for value in values])
    return groups, tuple(numbers)


def _number_or_text(value: Any) -> tuple[bool, Any]:
    """Returns what sorts numbers as numbers, before text."""
    return isinstance(value, str), value


def _encoded_images(shard: _Shard) -> Iterator[EncodedImage]:
    """Yields the encoded images of one file, in order."""
    batches = shard.file.iter_batches(_ROWS_PER_READ, columns=[shard.columns.image])
    row = 0
    while True:
        with reading(shard.field, shard.path):
            batch = next(batches, None)
        if batch is None:
            return
        for data in _image_bytes(batch.column(0)):
            if data is None:
                remedy = "store the encoded image itself, not only its path"
                raise shard.fault(row, "has no image bytes", remedy)
            yield EncodedImage(data, shard.field, _place(shard.path, row))
            row += 1


def _image_bytes(column: Any) -> list[bytes | None]:
    """Returns the encoded images of a struct or binary column."""
    import pyarrow as pa
    import pyarrow.compute

    if pa.types.is_struct(column.type):
        # Not StructArray.field, which ignores that the struct itself may be null.
        column = pyarrow.compute.struct_field(column, "bytes")
    return list(column.to_pylist())


def _find_columns(
    schema: Any, path: Path, config: DataConfig, *, is_train: bool
) -> _Columns:
    """Finds the columns of one file, by name, or images and labels by type."""
    import pyarrow as pa

    user = config.user_column if is_train else None
    group = None if is_train else config.group_column
    images = [field.name for field in schema if _holds_images(field.type)]
    named = (config.user_column, config.group_column)
    labels = [
        field.name
        for field in schema
        if pa.types.is_integer(field.type) and field.name not in named
    ]
    label = _pick("label_column", config.label_column, labels, path)
    names = [field.name for field in schema if _holds_names(field.type)]
    flags = [field.name for field in schema if pa.types.is_boolean(field.type)]
    return _Columns(
        image=_pick("image_column", config.image_column, images, path),
        label=label,
        user=user and _pick("user_column", user, names, path),
        group=group and _pick("group_column", group, names + flags, path),
        class_names=_class_names(schema.metadata or {}, label, path),
    )


def _holds_images(column_type: Any) -> bool:
    """Tells whether a column may hold encoded images."""
    import pyarrow as pa

    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        return index >= 0 and _holds_images(column_type.field(index).type)
    return bool(
        pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type)
    )


def _holds_names(column_type: Any) -> bool:
    """Tells whether a column may hold names, of users or groups: integers or text."""
    import pyarrow as pa

    if pa.types.is_dictionary(column_type):
        return _holds_names(column_type.value_type)
    tests = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    return any(test(column_type) for test in tests)


def _pick(setting: str, wanted: str | None, candidates: list[str], path: Path) -> str:
    """Returns the column that is named, or the only candidate."""
    if wanted in candidates:
        return wanted
    if wanted is None and len(candidates) == 1:
        return candidates[0]
    message = fault(
        f"data.{setting}",
        wanted,
        f"must name the column of {_KINDS[setting]} in {path}",
        f"candidates: {', '.join(candidates) or 'none'}",
    )
    raise ConfigError(message)


def _class_names(
    metadata: dict[bytes, bytes], label: str, path: Path
) -> tuple[str, ...]:
    """Returns the names that the ClassLabel feature declares, () if there is none."""
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}"))
        feature = described.get("info", {}).get("features", {}).get(label, {})
        return tuple(str(name) for name in feature.get("names", ()))
    except (ValueError, AttributeError, TypeError) as error:
        message = fault(
            "metadata",
            path,
            f"has a damaged `huggingface` entry ({error})",
            "write the file again",
        )
        raise DataError(message) from error


@contextmanager
def reading(field: str, path: Path) -> Iterator[None]:
    """Turns what pyarrow raises on a damaged file into a DataError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        message = fault(
            field,
            path,
            f"is not a readable parquet file ({error})",
            "copy or download it again",
        )
        raise DataError(message) from error


def _place(path: Path, row: int) -> str:
    """Returns how messages call a row."""
    return f"{path}, row {row}"


def load_parquet_images(field: str, value: str) -> tuple[ImageDataset, list[str]]:
    """Loads the images of parquet files, and where each is, as `file, row`.

    Args:
        field: What names them, for messages.
        value: File, glob or folder of shards.

    Raises:
        ConfigError: A column is ambiguous.
        DataError: A file, image or label is missing, damaged or unlike the others.
    """
    paths = resolve(field, value, shard_suffix=".parquet")
    shards = _open_shards(field, paths, DataConfig(source="parquet"))
    places = [
        f"{shard.path.name}, row {row}"
        for shard in shards
        for row in range(shard.file.metadata.num_rows)
    ]
    return _load_split(shards), places
