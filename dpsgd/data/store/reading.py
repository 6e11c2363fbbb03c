"""A finished store: checked when it is opened, each image once more when it is read."""

import hashlib
import json
import mmap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd.data.labels import check_labels
from dpsgd.data.store.layout import (
    FORMAT,
    MANIFEST,
    PLAN,
    RECORD,
    RECORDS,
    Manifest,
    digest_of,
    read_plan,
    shard_name,
)
from dpsgd.errors import DataError, fault

__all__ = ["Store"]

_REMEDY = "copy the store again, or prepare it anew"


class Store:
    """The images of a store, any of them at any time.

    Opening looks at the manifest, the index and the sizes of the shards, which takes
    no longer for large images. Nothing of a shard is read before it is asked for.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
        labels: (N,) int64.

    Args:
        path: The folder.
        field: What names it, for messages.

    Raises:
        DataError: It is not finished, truncated, of another format version, or has a
            wrong checksum.
    """

    def __init__(self, path: Path, *, field: str = "store") -> None:
        self.path = path
        self._field = field
        self.manifest = self._read_manifest()
        self._records = self._read_records()
        self._check_shards()
        self.labels: NDArray[np.int64] = self._records["label"].astype(np.int64)
        check_labels(
            self.labels,
            len(self.manifest.class_names),
            field=field,
            place=self.place,
            remedy=_REMEDY,
        )
        self._shards: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """(N,) CRC-32 of each image as it was encoded."""
        return self._records["checksum"].astype(np.uint32)

    def place(self, index: int) -> str:
        """Returns how messages call an image."""
        return f"{self.path}, index {index}"

    def read(self, index: int) -> bytes:
        """Returns one image as it was encoded.

        Args:
            index: In [0, N).

        Raises:
            DataError: Its bytes are not those that were written, or cannot be read.
        """
        record = self._records[index]
        start, length = int(record["offset"]), int(record["length"])
        data = self._shard(int(record["shard"]))[start : start + length]
        if zlib.crc32(data) != int(record["checksum"]):
            rule = "has a wrong checksum: the image is damaged"
            raise DataError(fault(self._field, self.place(index), rule, _REMEDY))
        return data

    def fingerprint(self) -> str:
        """Returns the SHA-256 that tells the images of this store from all others."""
        return self.manifest.records_sha256

    def verify(self, on_image: Callable[[], object] = lambda: None) -> list[int]:
        """Reads every image, and returns the indices of those that are damaged.

        Args:
            on_image: Called after each.

        Raises:
            DataError: A shard cannot be opened.
        """
        return list(self._damaged(on_image))

    def _damaged(self, on_image: Callable[[], object]) -> Iterator[int]:
        """Yields the indices of images whose bytes have another checksum."""
        for index in range(len(self)):
            # One that cannot be opened is not an image that is damaged.
            self._shard(int(self._records["shard"][index]))
            try:
                self.read(index)
            except DataError:
                yield index
            on_image()

    def _shard(self, number: int) -> mmap.mmap:
        """Returns one shard, mapped into memory when it is first used."""
        if number not in self._shards:
            name = shard_name(number)
            try:
                with (self.path / name).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                rule = f"{name} cannot be read ({error.strerror})"
                remedy = "give access to it, or copy the store again"
                raise self._fault(rule, remedy) from error
            self._shards[number] = mapped
        return self._shards[number]

    def _read_manifest(self) -> Manifest:
        """Reads what the store says of itself."""
        try:
            content: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
            written, digest = content.pop("format"), content.pop("digest")
        except FileNotFoundError:
            raise self._missing() from None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            rule = f"{MANIFEST} cannot be read ({error})"
            raise self._fault(rule, _REMEDY) from error
        if written != FORMAT:
            rule = f"has format version {written}, and {FORMAT} is read here"
            raise self._fault(rule, "prepare it anew with this version")
        if digest_of({"format": written, **content}) != digest:
            raise self._fault(f"{MANIFEST} has a wrong checksum", _REMEDY)
        return Manifest.from_dict(content)

    def _missing(self) -> DataError:
        """Returns the error for a folder without manifest."""
        try:
            plan = read_plan(self.path)
        except OSError as error:
            rule = f"{PLAN} cannot be read ({error.strerror})"
            return self._fault(rule, "give access to it")
        if plan is not None:
            remedy = "go on with the bin/dpsgd-prepare that began it"
            return self._fault("is not finished", remedy)
        remedy = "make one of your images with bin/dpsgd-prepare"
        return self._fault("is not a store", remedy)

    def _read_records(self) -> NDArray[np.void]:
        """Reads the index, and compares it with the manifest."""
        try:
            content = (self.path / RECORDS).read_bytes()
        except OSError as error:
            raise self._fault(f"{RECORDS} cannot be read ({error})", _REMEDY) from error
        expected = self.manifest.num_images * RECORD.itemsize
        if len(content) != expected:
            rule = f"is truncated: {RECORDS} has {len(content)} bytes of {expected}"
            raise self._fault(rule, _REMEDY)
        if hashlib.sha256(content).hexdigest() != self.manifest.records_sha256:
            raise self._fault(f"{RECORDS} has a wrong checksum", _REMEDY)
        return np.frombuffer(content, RECORD)

    def _check_shards(self) -> None:
        """Refuses shards of other sizes, and images that lie beyond their shard."""
        for number, expected in enumerate(self.manifest.shards):
            path = self.path / shard_name(number)
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                rule = f"is truncated: {path.name} has {size:,} bytes of {expected:,}"
                raise self._fault(rule, _REMEDY)
        sizes = np.array([*self.manifest.shards, 0], np.uint64)
        shard = np.minimum(self._records["shard"], len(sizes) - 1)
        outside = self._records["offset"] + self._records["length"] > sizes[shard]
        if outside.any():
            index = int(outside.argmax())
            raise self._fault(f"index {index} lies beyond its shard", _REMEDY)

    def _fault(self, rule: str, remedy: str) -> DataError:
        """Returns the error that names the store."""
        return DataError(fault(self._field, self.path, rule, remedy))
