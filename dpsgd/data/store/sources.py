"""What a store is made of: class folders of image files, or parquet files."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsgd.config import DataConfig
from dpsgd.data.files import EncodedImage, check_held_once, resolve
from dpsgd.data.image_folder import list_folders
from dpsgd.data.parquet import ParquetImages

__all__ = ["ImageSource", "open_source"]

_FIELD = "SOURCE"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """Images to be packed, in one order that does not change.

    Attributes:
        labels: (N,) int64.
        class_names: Name of each class in label order; () if none are declared.
        digest: Tells this source from others, by the names and sizes of its files.
        encoded: Yields the images from a position on.
        is_folder: Whether each image is a file of its own, in class folders.
        root: Folder that holds all files, at any depth.
        files: Image files or parquet files, in order.
    """

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    digest: str
    encoded: Callable[[int], Iterator[EncodedImage]]
    is_folder: bool
    root: Path
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def content_sha256(self) -> str:
        """Returns a digest of the encoded images in their order, whatever holds them.

        Raises:
            DataError: A file cannot be read; named.
        """
        digest = hashlib.sha256()
        for image in self.encoded(0):
            content = image.content()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()


def open_source(
    source: str,
    *,
    field: str = _FIELD,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """Lists the images of a source, decoding none.

    Args:
        source: Folder of class folders, as of torchvision's ImageNet and of Places365;
            or parquet file, glob of them or folder of them.
        field: What names it, for messages.
        image_column: Parquet column of images; found by its type when None.
        label_column: Parquet column of labels; found by its type when None.

    Raises:
        UserError: It is missing, held twice, or unlike what is expected; named.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not any(path.glob("*.parquet")):
        return _of_folder(field, path)
    paths = resolve(field, source, shard_suffix=".parquet")
    check_held_once((field, path) for path in paths)
    columns = DataConfig(
        source="parquet", image_column=image_column, label_column=label_column
    )
    images = ParquetImages.of(field, paths, columns)
    return ImageSource(
        labels=images.labels,
        class_names=images.class_names,
        digest=_digest([(one.name, one) for one in paths]),
        encoded=images.encoded,
        is_folder=False,
        root=Path(os.path.commonpath([one.parent for one in paths])),
        files=images.paths,
    )


def _of_folder(field: str, root: Path) -> ImageSource:
    """Lists the images of class folders."""
    images = list_folders(field, [root])
    paths = [Path(str(one.data)) for one in images.encoded]
    return ImageSource(
        labels=np.array(images.labels, np.int64),
        class_names=images.class_names,
        digest=_digest([(str(path.relative_to(root)), path) for path in paths]),
        encoded=lambda start: islice(images.encoded, start, None),
        is_folder=True,
        root=root,
        files=tuple(paths),
    )


def _digest(files: list[tuple[str, Path]]) -> str:
    """Returns the SHA-256 of the names and sizes of files."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()
