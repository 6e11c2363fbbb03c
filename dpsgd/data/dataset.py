"""Data sets: what all of them offer, and one that holds its images as a tensor."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.data.labels import check_labels
from dpsgd.errors import ConfigError, DataError, fault

__all__ = [
    "DataSplits",
    "Dataset",
    "ImageDataset",
    "has_room",
    "held_in_memory",
    "upload",
]

# Activations and per-sample gradients need the rest of the memory.
_SHARE_OF_FREE_MEMORY = 1 / 3


class Dataset(Protocol):
    """Labelled images that any rows may be asked for, wherever the pixels are."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class in label order; () if none are declared."""
        ...

    @property
    def users(self) -> Tensor | None:
        """(N,) int64, the user of each example; None if the source knows none."""
        ...

    @property
    def groups(self) -> Tensor | None:
        """(N,) int64, the group of each example; None if there are none."""
        ...

    @property
    def group_names(self) -> tuple[str, ...]:
        """Name of each group."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of what the network is given."""
        ...

    @property
    def num_users(self) -> int:
        """Users held, as sensitive as the number of examples."""
        ...

    @property
    def decoder(self) -> str | None:
        """What turns bytes into pixels, with version; None if pixels are held."""
        ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Returns what tells these examples from others; private like them."""
        ...

    def image_keys(self) -> NDArray[np.uint64]:
        """Returns (N,) numbers that each follow from one image, and from nothing else.

        Private like the images: never publish them.
        """
        ...

    def placed(self, device: torch.device | str, *, num_workers: int = 0) -> "Dataset":
        """Returns the data set where its rows are got at fastest.

        Args:
            device: Where they are used.
            num_workers: Processes that decode, if images are not held as pixels.
        """
        ...

    def batches(
        self,
        rows: Tensor,
        sizes: Sequence[int],
        *,
        crops: Tensor | None = None,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the canvases of rows, from which views are cut, and their labels.

        An example has one canvas for all its K views, or where each view shows a part
        of its own, K.

        Args:
            rows: (R,) int64 on the CPU; a row may occur more than once.
            sizes: Rows of every batch, R in all.
            crops: (R, K, 22) of `ViewParameters`, which say what canvases show.
            device: Where both are wanted.

        Yields:
            Canvases (M, J, C, H, W) uint8 and labels (M,), batch after batch.

        Raises:
            DataError: An image cannot be read, named. None is ever left out.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """Labelled images of one size, all in memory.

    Args:
        images: (N, C, H, W) uint8 pixels, 0 to 255.
        labels: (N,) int64, on the same device, each at least 0 and below the number
            of declared classes.
        class_names: Name of each class in label order; () if the source declares
            none, because the number of classes must not be counted from private
            labels. `dataclasses.replace` declares them later and checks again.
        users: (N,) int64, on the CPU, the user whom each example belongs to; users are
            numbered from 0 without gaps. None if the source knows no users.
        groups: (N,) int64, on the CPU, the group that each example is counted with
            when accuracy is told by group; None if there are no groups.
        group_names: Name of each group in the order of their numbers.

    Raises:
        DataError: A shape, type or label is not as above.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    users: Tensor | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_tensor("images", self.images, torch.uint8, "(N, C, H, W)")
        _check_tensor("labels", self.labels, torch.int64, "(N,)")
        if len(self.images) != len(self.labels):
            message = fault(
                "labels",
                f"<{len(self.labels)} labels>",
                f"must be one an image, of which there are {len(self.images)}",
                "give both the same length",
            )
            raise DataError(message)
        check_labels(
            self.labels.cpu().numpy(),
            len(self.class_names),
            field="labels",
            place="row {}".format,
            remedy="correct the label or declare its class",
        )
        if self.users is not None:
            self._check_numbers("users", self.users)
        if self.groups is not None:
            self._check_numbers("groups", self.groups, count=len(self.group_names))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of each image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def num_users(self) -> int:
        """Users held: sensitive like the number of examples, and as little public.

        Raises:
            DataError: The source knows no users.
        """
        if self.users is None:
            rule = "the data set does not say whose each example is"
            raise DataError(fault("data.user_column", None, rule, "name the column"))
        return int(self.users.max()) + 1

    @property
    def decoder(self) -> str | None:
        """None: pixels are held."""
        return None

    def placed(
        self, device: torch.device | str, *, num_workers: int = 0
    ) -> "ImageDataset":
        """Returns the data set on `device` if there is ample room, else where it is.

        Microbatches are gathered where the images lie, so a data set on the device
        costs no transfer a step; one that stays behind costs a copy of each microbatch.

        Args:
            device: CPU, or a CUDA device; it is used if the data set takes at most a
                third of the memory that is free on it.
            num_workers: Nothing is left to decode.
        """
        del num_workers
        needed = self.images.nbytes + self.labels.nbytes
        return self.to(device) if has_room(device, needed) else self

    def batches(
        self,
        rows: Tensor,
        sizes: Sequence[int],
        *,
        crops: Tensor | None = None,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (M, 1, C, H, W) and labels (M,), gathered where they lie."""
        assert crops is None  # the loader of settings sees to it
        rows = upload(rows, self.images.device)
        labels = upload(self.labels[rows], device)
        start = 0
        for size in sizes:
            place = slice(start, start + size)
            yield upload(self.images[rows[place]], device)[:, None], labels[place]
            start += size

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Returns the data set with both tensors on `device`."""
        return dataclasses.replace(
            self, images=self.images.to(device), labels=self.labels.to(device)
        )

    def image_keys(self) -> NDArray[np.uint64]:
        """Returns (N,) BLAKE2b hashes of the pixels, of 64 bits; private like them."""
        images = self.images.cpu().contiguous().numpy()
        hashes = (hashlib.blake2b(one, digest_size=8).digest() for one in images)
        return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of shape, images, labels and users, in hexadecimal.

        Tells a resumed run whether it still has the same data. It is a function of
        private data without noise: never publish it.
        """
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels, self.users):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _check_numbers(
        self, name: str, owners: Tensor, *, count: int | None = None
    ) -> None:
        """Refuses owners of examples that are not one each, numbered from 0."""
        _check_tensor(name, owners, torch.int64, "(N,)")
        numbers = np.unique(owners.numpy())
        expected = np.arange(len(numbers) if count is None else count)
        if len(owners) != len(self) or not np.array_equal(numbers, expected):
            message = fault(
                name,
                f"<{len(owners)} entries, {len(numbers)} different>",
                "must be one an example, numbered from 0 without gaps",
                "number them in the order in which they first occur",
            )
            raise DataError(message)


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits:
    """The examples trained on, and the public ones that accuracy is measured on.

    Args:
        train: The private set.
        test: The public set.
        sizes_are_set: Whether settings decide how large the images of both are, which
            may then differ.

    Raises:
        DataError: The two differ in image shape or in classes.
    """

    train: Dataset
    test: Dataset
    sizes_are_set: bool = False

    def __post_init__(self) -> None:
        same = self.train.image_shape == self.test.image_shape
        if not same and not self.sizes_are_set:
            message = fault(
                "data.test",
                f"<images of shape {self.test.image_shape}>",
                f"must have the training images' shape {self.train.image_shape}",
                "convert one of the two sets",
            )
            raise DataError(message)
        if self.train.class_names != self.test.class_names:
            raise DataError(_class_difference(self.train, self.test))


def held_in_memory(dataset: Dataset) -> ImageDataset:
    """Returns a data set whose images are held as pixels.

    Raises:
        ConfigError: They are not.
    """
    if isinstance(dataset, ImageDataset):
        return dataset
    rule = "the images must be held in memory for this"
    remedy = "take another source, such as image_folder or parquet"
    raise ConfigError(fault("data.source", "store", rule, remedy))


def has_room(device: torch.device | str, num_bytes: int) -> bool:
    """Returns whether data of some size fit on a device with ample room to work."""
    target = torch.device(device)
    if target.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(target)
    return num_bytes <= free_bytes * _SHARE_OF_FREE_MEMORY


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor on `device`, without waiting for what that is doing.

    A copy from ordinary memory would wait until the device has finished all its work;
    one from pinned memory takes its place behind it.
    """
    device = torch.device(device)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: str) -> None:
    """Refuses a tensor of another type, or with another number of dimensions."""
    num_dims = shape.count(",") + (shape != "(N,)")
    if tensor.dtype != dtype or tensor.ndim != num_dims:
        message = fault(
            name,
            f"<{tensor.dtype} of shape {tuple(tensor.shape)}>",
            f"must be {dtype} of shape {shape}",
            "convert it before making the data set",
        )
        raise DataError(message)


def _class_difference(train: Dataset, test: Dataset) -> str:
    """Words how the classes of the two sets differ."""
    missing = [name for name in train.class_names if name not in test.class_names]
    extra = [name for name in test.class_names if name not in train.class_names]
    rule = "must have the classes of the training set in the same order"
    if missing:
        rule += f", lacks {_shorten(missing)}"
    if extra:
        rule += f", has besides {_shorten(extra)}"
    shown = f"<{len(test.class_names)} classes>"
    return fault("data.test", shown, rule, "make the two sets agree")


def _shorten(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
