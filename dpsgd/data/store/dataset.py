"""Stores as data sets: rows are decoded when they are drawn."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data.augmentation import canvas_side
from dpsgd.data.dataset import DataSplits, upload
from dpsgd.data.files import resolve_splits
from dpsgd.data.store.decoding import Decoder, decoder_version
from dpsgd.data.store.framing import CentralSquare, Framing, RandomParts
from dpsgd.data.store.reading import Store
from dpsgd.errors import ConfigError, fault

__all__ = ["StoreDataset", "load_stores"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreDataset:
    """The images of a store, of which a network is shown canvases.

    Args:
        store: Encoded images and labels.
        framing: What of an image canvases show.
        image_size: Side of the views that are cut from them.
        num_workers: Processes that decode; 0 decodes where rows are asked for.
    """

    store: Store
    framing: Framing
    image_size: int
    num_workers: int = 0
    users: None = None
    groups: None = None
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(self.store.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class in label order; () if none are declared."""
        return self.store.manifest.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (3, H, W) of a view."""
        return 3, self.image_size, self.image_size

    @property
    def num_users(self) -> int:
        """Users held.

        Raises:
            ConfigError: Always: a store knows no users.
        """
        rule = "a store does not say whose each example is"
        remedy = "take data.source=parquet"
        raise ConfigError(fault("privacy.unit", "user", rule, remedy))

    @property
    def decoder(self) -> str:
        """The libraries that decode, with versions."""
        return decoder_version()

    def image_keys(self) -> NDArray[np.uint64]:
        """Returns (N,) CRC-32 checksums of the encoded images; private like them."""
        return self.store.checksums.astype(np.uint64)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of checksums and labels of all images; private like them.

        The images themselves are not read.
        """
        names = "\0".join(self.class_names)
        content = f"{self.store.fingerprint()}\0{names}"
        return hashlib.sha256(content.encode()).hexdigest()

    def placed(
        self, device: torch.device | str, *, num_workers: int = 0
    ) -> "StoreDataset":
        """Returns the data set with processes that decode.

        Args:
            device: Where rows are used; nothing is kept there.
            num_workers: Processes.
        """
        del device
        return dataclasses.replace(self, num_workers=num_workers)

    def batches(
        self,
        rows: Tensor,
        sizes: Sequence[int],
        *,
        crops: Tensor | None = None,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields canvases (M, J, 3, H, W) and labels (M,), decoded ahead of their use.

        A batch is copied to pinned memory, which makes room for the next one at once,
        and from there to the device beside what that is doing.

        Args:
            rows: As for `Dataset.batches`.
            sizes: As for `Dataset.batches`.
            crops: As for `Dataset.batches`.
            device: As for `Dataset.batches`.

        Raises:
            DataError: An image is damaged or does not decode; named by its index.
        """
        labels = upload(self.labels[rows], device)
        numbers = None if crops is None else crops.numpy()
        start = 0
        for canvases in self._decoder.batches(rows.numpy(), sizes, numbers):
            size = len(canvases)
            yield _copied(canvases, device), labels[start : start + size]
            start += size

    @cached_property
    def _decoder(self) -> Decoder:
        """What decodes, made when it is first used."""
        return Decoder(self.store, self.framing, num_workers=self.num_workers)


def load_stores(config: DataConfig) -> DataSplits:
    """Opens the stores `data.train` and `data.test`, without reading an image.

    Args:
        config: The section `data`.

    Raises:
        ConfigError: A store is not given, or more than one.
        DataError: A store is not finished, damaged, or of another format; or the two
            have different classes.
    """
    train, test = (
        _opened(field, paths)
        for field, paths in zip(
            ("data.train", "data.test"),
            resolve_splits(config, shard_suffix=None),
            strict=True,
        )
    )
    size = config.image_size
    assert size is not None  # the loader of settings sees to it
    framing: Framing
    if config.augmentation == "resized_crop_flip":
        views = config.augmentation_multiplicity
        framing = RandomParts(side=size, num_canvases=views)
    else:
        framing = CentralSquare(side=canvas_side(config.augmentation, size))
    shown = config.eval_image_size or size
    return DataSplits(
        train=StoreDataset(store=train, framing=framing, image_size=size),
        test=StoreDataset(
            store=test, framing=CentralSquare(side=shown), image_size=shown
        ),
        sizes_are_set=True,
    )


def _opened(field: str, paths: list[Path]) -> Store:
    """Opens the one store of a setting."""
    if len(paths) != 1:
        rule = "must name one store"
        remedy = "pack all images into one with bin/dpsgd-prepare"
        raise ConfigError(fault(field, f"<{len(paths)} paths>", rule, remedy))
    return Store(paths[0], field=field)


def _copied(canvases: Tensor, device: torch.device) -> Tensor:
    """Returns canvases on the device, in memory of their own.

    A second stream copies while the first computes; pinned memory is given back when
    its copy is done, so that batches take turns in two or three pieces of it.
    """
    if device.type != "cuda":
        return canvases.clone(memory_format=torch.preserve_format)
    current = torch.cuda.current_stream(device)
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        moved = canvases.pin_memory().to(device, non_blocking=True)
    current.wait_stream(stream)
    moved.record_stream(current)
    return moved


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream on which batches go to a device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
