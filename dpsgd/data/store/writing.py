"""A store in the making: whole after every batch, whenever the process is killed."""

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dpsgd.data.store.layout import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    PLAN,
    RECORD,
    RECORDS,
    Manifest,
    read_plan,
    shard_name,
    write_whole,
)
from dpsgd.errors import DataError, fault, is_full

__all__ = ["StoreWriter"]

SHARD_BYTES = 4 << 30


class StoreWriter:
    """Adds images to a store, from the start or from where it was left.

    The journal has one record for every image that was looked at, and is written after
    the bytes of which it tells, so that what it says is always there. What lies beyond
    it is cut off when the store is gone on with. Used as a context, in which no other
    process may write the store.

    Attributes:
        position: Images of the source that were looked at: where to go on.

    Args:
        path: Folder of the store; made if it is not there.
        plan: What it is made of; one that is gone on with must have the same.

    Raises:
        DataError: On entering: the store is finished, is no store, has another plan,
            is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self._path = path
        self._plan = json.loads(json.dumps({"format": FORMAT, **plan}))
        self.position = 0
        self._shard, self._end = 0, 0  # where the next image goes

    def __enter__(self) -> Self:
        with ExitStack() as held, self._writing():
            self._begin()
            file = held.enter_context((self._path / PLAN).open())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                rule = "is being written by another process"
                raise self._fault(rule, "wait for it, or name another") from error
            self._go_on()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def undecodable(self) -> list[int]:
        """Positions in the source of the images that do not decode."""
        lengths = self._read_journal()["length"]
        return [int(position) for position in np.flatnonzero(lengths == 0)]

    def add(self, images: Sequence[tuple[bytes | None, int]]) -> None:
        """Adds the next images of the source.

        Args:
            images: Encoded bytes, None for an image that does not decode, and label.

        Raises:
            DataError: The disk is full; what was added before is kept.
        """
        with self._writing():
            records = self._append(images)
            with (self._path / JOURNAL).open("ab") as file:
                _write(file, records.tobytes())
        self.position += len(records)

    def finish(
        self,
        class_names: Sequence[str],
        options: Mapping[str, Any],
        skipped: Sequence[Mapping[str, Any]],
    ) -> None:
        """Leaves out what does not decode, and writes the manifest.

        Args:
            class_names: In label order; empty if none are declared.
            options: How images were resized.
            skipped: The images left out, by name and index.

        Raises:
            DataError: The disk is full; all that was added is kept.
        """
        with self._writing():
            self._finish(class_names, options, skipped)

    def _finish(
        self,
        class_names: Sequence[str],
        options: Mapping[str, Any],
        skipped: Sequence[Mapping[str, Any]],
    ) -> None:
        """Writes the index and the manifest, and removes what is of use no more."""
        journal = self._read_journal()
        records = journal[journal["length"] > 0]
        content = records.tobytes()
        write_whole(self._path / RECORDS, content)
        manifest = Manifest(
            num_images=len(records),
            class_names=tuple(class_names),
            shards=tuple(_ends(records).values()),
            records_sha256=hashlib.sha256(content).hexdigest(),
            options=options,
            skipped=tuple(skipped),
        )
        write_whole(self._path / MANIFEST, manifest.to_json().encode())
        (self._path / JOURNAL).unlink()
        (self._path / PLAN).unlink()

    def _begin(self) -> None:
        """Writes the plan, or compares it with that of what is there."""
        path = self._path
        if (path / MANIFEST).exists():
            rule = "is finished, and nothing is overwritten"
            raise self._fault(rule, "name another folder")
        begun = read_plan(path)
        if begun is not None:
            self._compare(begun)
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            rule = "is there already and is not a store"
            raise self._fault(rule, "name a folder that is new or empty")
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / PLAN, json.dumps(self._plan).encode())

    def _compare(self, begun: Mapping[str, Any]) -> None:
        """Refuses to go on with anything but what was begun."""
        plan = self._plan
        others = [key for key in plan if begun.get(key) != plan[key]]
        if others:
            rule = f"was begun with other {', '.join(others)}"
            remedy = "go on with what it was begun with, or name another folder"
            raise self._fault(rule, remedy)

    def _read_journal(self) -> NDArray[np.void]:
        """Returns what is there, without a record that was cut in two."""
        path = self._path / JOURNAL
        content = path.read_bytes() if path.exists() else b""
        whole = len(content) // RECORD.itemsize * RECORD.itemsize
        return np.frombuffer(content[:whole], RECORD)

    def _go_on(self) -> None:
        """Removes what a killed process wrote beyond the journal."""
        records = self._read_journal()
        self.position = len(records)
        if self.position:
            os.truncate(self._path / JOURNAL, records.nbytes)
        ends = _ends(records)
        self._shard, self._end = max(ends.items(), default=(0, 0))
        for path in self._path.glob("shard-*.bin"):
            number = int(path.stem.removeprefix("shard-"))
            if number not in ends:
                path.unlink()
            elif path.stat().st_size < ends[number]:
                rule = f"{path.name} is shorter than the journal says"
                raise self._fault(rule, "delete the folder and begin anew")
            else:
                os.truncate(path, ends[number])

    def _append(self, images: Sequence[tuple[bytes | None, int]]) -> NDArray[np.void]:
        """Writes the bytes of images, and returns their records."""
        records = np.zeros(len(images), RECORD)
        written: dict[int, list[bytes]] = {}
        for row, (data, label) in enumerate(images):
            if data is None:
                records[row] = (0, 0, 0, 0, label)
                continue
            if self._end > 0 and self._end + len(data) > SHARD_BYTES:
                self._shard, self._end = self._shard + 1, 0
            checksum = zlib.crc32(data)
            records[row] = (self._shard, checksum, self._end, len(data), label)
            written.setdefault(self._shard, []).append(data)
            self._end += len(data)
        for number, parts in written.items():
            with (self._path / shard_name(number)).open("ab") as file:
                _write(file, b"".join(parts))
        return records

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what a full or locked disk raises into a DataError."""
        try:
            yield
        except OSError as error:
            rule = f"cannot be written ({error.strerror})"
            remedy = "give access to it, or name another folder"
            if is_full(error):
                remedy = "make room, and go on with the same command"
            raise self._fault(rule, remedy) from error

    def _fault(self, rule: str, remedy: str) -> DataError:
        """Returns the error that names the store."""
        return DataError(fault("STORE", self._path, rule, remedy))


def _ends(records: NDArray[np.void]) -> dict[int, int]:
    """Returns where each shard ends, by its number, ascending."""
    held = records[records["length"] > 0]
    numbers, first = np.unique(held["shard"][::-1], return_index=True)
    last = held[len(held) - 1 - first]
    ends = last["offset"].astype(np.int64) + last["length"]
    return {int(one): int(end) for one, end in zip(numbers, ends, strict=True)}


def _write(file: Any, content: bytes) -> None:
    """Writes bytes that are on disk when this returns."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
