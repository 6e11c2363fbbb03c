"""A folder of class folders of image files: root/class_name/*.png."""

from pathlib import Path
from typing import NamedTuple

import torch

from dpsgd.config import DataConfig
from dpsgd.data.dataset import DataSplits, ImageDataset
from dpsgd.data.files import (
    EncodedImage,
    check_held_once,
    decode_images,
    resolve,
    resolve_splits,
)
from dpsgd.errors import DataError, fault

__all__ = ["FolderImages", "list_folders", "load_folder_images", "load_image_folder"]

_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)


def load_image_folder(config: DataConfig) -> DataSplits:
    """Loads `data.train` and `data.test` from folders of class folders.

    The names of the class folders, sorted, are the classes. Within a class, images
    are sorted by path, at any depth. Files without the ending of an image and names
    that start with a dot are left out. Several roots are joined.

    Args:
        config: The section `data`.

    Raises:
        ConfigError: `data.train` or `data.test` is not given.
        DataError: There is no such folder, a class is empty or in one split only, or
            an image is damaged, unlike the others or held twice, in one split or in
            both; the message names it.
    """
    train_roots, test_roots = resolve_splits(config, shard_suffix=None)
    train = list_folders("data.train", train_roots)
    test = list_folders("data.test", test_roots)
    images = [*train.encoded, *test.encoded]
    check_held_once((image.field, Path(image.place)) for image in images)
    return DataSplits(train=_decoded(train), test=_decoded(test))


class FolderImages(NamedTuple):
    """The images of class folders, none decoded yet, with labels and class names."""

    encoded: list[EncodedImage]
    labels: list[int]
    class_names: tuple[str, ...]


def list_folders(field: str, roots: list[Path]) -> FolderImages:
    """Lists all images under the roots of one set, in the order that is documented.

    Args:
        field: What names the set, for messages.
        roots: Folders of class folders.

    Raises:
        DataError: As for `load_image_folder`, but that nothing is decoded.
    """
    folders = [folder for root in roots for folder in _class_folders(field, root)]
    class_names = sorted({folder.name for folder in folders})
    index = {name: label for label, name in enumerate(class_names)}
    encoded: list[EncodedImage] = []
    labels: list[int] = []
    held: list[Path] = []
    for folder in folders:
        paths = _image_paths(field, folder)
        encoded += [EncodedImage(path, field, str(path)) for path in paths]
        labels += [index[folder.name]] * len(paths)
        held += paths
    check_held_once((field, path) for path in held)
    return FolderImages(encoded, labels, tuple(class_names))


def _decoded(images: FolderImages) -> ImageDataset:
    """Returns the images of one split, decoded."""
    encoded, labels, class_names = images
    return ImageDataset(
        images=decode_images(encoded, len(labels)),
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=class_names,
    )


def _class_folders(field: str, root: Path) -> list[Path]:
    """Returns the class folders of one root, sorted."""
    folders = sorted(
        path for path in root.glob("*") if path.is_dir() and path.name[0] != "."
    )
    if not folders:
        message = fault(
            field,
            root,
            "must be a folder that holds one folder for each class",
            "sort the images into class folders, or use another data.source",
        )
        raise DataError(message)
    return folders


def _image_paths(field: str, folder: Path) -> list[Path]:
    """Returns the image files of one class, sorted."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and path.name[0] != "."
    )
    if not paths:
        message = fault(
            field,
            folder,
            "is a class folder without images",
            "add images or remove the folder",
        )
        raise DataError(message)
    return paths


def load_folder_images(field: str, value: str) -> tuple[ImageDataset, list[str]]:
    """Loads the images of a folder of class folders, and the path of each.

    Args:
        field: What names it, for messages.
        value: The folder.

    Raises:
        DataError: As for `load_image_folder`.
    """
    roots = resolve(field, value, shard_suffix=None)
    places = [
        str(path)
        for root in roots
        for folder in _class_folders(field, root)
        for path in _image_paths(field, folder)
    ]
    return _decoded(list_folders(field, roots)), places
