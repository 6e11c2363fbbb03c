"""Where images come from: a registry of sources, and the two that need no files."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data.dataset import DataSplits, ImageDataset
from dpsgd.data.image_folder import load_folder_images, load_image_folder
from dpsgd.data.parquet import load_parquet, load_parquet_images
from dpsgd.data.store.dataset import load_stores
from dpsgd.errors import ConfigError, DataError, did_you_mean, fault

__all__ = [
    "SOURCES",
    "load_datasets",
    "load_digits",
    "load_images",
    "load_torchvision",
]

_TORCHVISION_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
}
_DIGITS_TEST_STRIDE = 5
_DIGITS_MAX = 16


def load_datasets(config: DataConfig) -> DataSplits:
    """Loads the training and test examples from the source that is configured.

    Args:
        config: The section `data`.

    Returns:
        Both sets on the CPU, with equal image shape and classes.

    Raises:
        ConfigError: A setting is missing or does not suit the source.
        DataError: The data are missing, damaged or unlike what was declared.
    """
    return SOURCES[config.source](config)


def load_images(field: str, value: str) -> tuple[ImageDataset, list[str]]:
    """Loads one set of images from files, and says where each of them is.

    Args:
        field: What names the set, for messages.
        value: Parquet file, glob or folder of them, or a folder of class folders.

    Raises:
        UserError: The files are missing, damaged or unlike one another.
    """
    path = Path(value).expanduser()
    if path.is_dir() and not any(path.glob("*.parquet")):
        return load_folder_images(field, value)
    return load_parquet_images(field, value)


def load_digits(config: DataConfig) -> DataSplits:
    """Loads the handwritten digits that come with scikit-learn.

    Images are 8x8 with one channel; their values 0 to 16 become 0 to 255 by rounding.
    Every fifth example, from the first, is a test example: 1437 train, 360 test.

    Args:
        config: The section `data`; none of its other fields is used.
    """
    from sklearn.datasets import load_digits as load_bunch

    bunch = load_bunch()
    pixels = np.rint(bunch.images * (255 / _DIGITS_MAX)).astype(np.uint8)
    images = torch.from_numpy(pixels)[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_test = torch.arange(len(labels)) % _DIGITS_TEST_STRIDE == 0
    class_names = tuple(str(name) for name in bunch.target_names)
    train, test = (
        ImageDataset(images=images[part], labels=labels[part], class_names=class_names)
        for part in (~is_test, is_test)
    )
    return DataSplits(train=train, test=test)


def load_torchvision(config: DataConfig) -> DataSplits:
    """Loads a named public data set, downloading it to `data.root` if need be.

    Args:
        config: The section `data`; `name` and `root` are used.

    Raises:
        ConfigError: `data.name` is not one of the known data sets.
        DataError: The download failed or the files are damaged.
    """
    if config.name not in _TORCHVISION_CLASSES:
        rule = f"must be one of {', '.join(_TORCHVISION_CLASSES)}"
        otherwise = "choose one, or another data.source"
        remedy = did_you_mean(
            config.name or "", _TORCHVISION_CLASSES, otherwise=otherwise
        )
        raise ConfigError(fault("data.name", config.name, rule, remedy))
    with _alone_in(config.root):
        return DataSplits(
            train=_load_torchvision_split(config.name, config.root, is_train=True),
            test=_load_torchvision_split(config.name, config.root, is_train=False),
        )


@contextmanager
def _alone_in(root: str) -> Iterator[None]:
    """Lets other processes of this machine, such as runs of a sweep, wait meanwhile.

    Two that download to one folder at once would each unpack what the other writes.
    """
    digest = hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16]
    path = os.path.join(tempfile.gettempdir(), f"dpsgd-{os.getuid()}-{digest}.lock")
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load_torchvision_split(name: str, root: str, *, is_train: bool) -> ImageDataset:
    """Loads one split of a torchvision data set."""
    import torchvision.datasets

    split = {"split": "train" if is_train else "test"}
    which: dict[str, Any] = split if name == "svhn" else {"train": is_train}
    dataset_class = getattr(torchvision.datasets, _TORCHVISION_CLASSES[name])
    try:
        source = dataset_class(root, download=True, **which)
    except (OSError, RuntimeError) as error:
        message = fault(
            "data.root",
            root,
            f"does not hold {name}, and downloading it failed ({error})",
            "put the archive there if you are offline, or use data.source=parquet",
        )
        raise DataError(message) from error
    labels = source.labels if name == "svhn" else source.targets
    # SVHN ships without class names, and its classes are the digits.
    class_names = getattr(source, "classes", [str(digit) for digit in range(10)])
    return ImageDataset(
        images=_channels_first(source.data, is_channels_first=name == "svhn"),
        labels=torch.as_tensor(labels, dtype=torch.int64),
        class_names=tuple(class_names),
    )


def _channels_first(pixels: Any, *, is_channels_first: bool) -> Tensor:
    """Returns (N, C, H, W) from the layout that torchvision keeps."""
    images = torch.as_tensor(pixels)
    if images.ndim == 3:
        images = images[:, None]  # (N, 1, H, W)
    elif not is_channels_first:
        images = images.permute(0, 3, 1, 2)  # (N, C, H, W)
    return images.contiguous()


SOURCES: Mapping[str, Callable[[DataConfig], DataSplits]] = {
    "digits": load_digits,
    "torchvision": load_torchvision,
    "parquet": load_parquet,
    "image_folder": load_image_folder,
    "store": load_stores,
}
"""Loader of each `data.source`."""
