"""From rows of a store to canvases: decoded in processes, written where they are read.

Processes, because decoding leaves Python's lock only for part of the time, and whoever
trains must not wait for it. All of them work on one batch at a time, in small tasks, so
that the first batch of a step is there soon; a loader that gives each process a batch
of its own, as PyTorch's does, starts every step slowly. Pixels go through one piece of
shared memory and are never pickled.
"""

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count, pairwise
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.data.files import EncodedImage, opened_as_rgb
from dpsgd.data.store.framing import Framing
from dpsgd.data.store.reading import Store
from dpsgd.errors import ConfigError, fault

__all__ = ["Decoder", "decode_into", "decoder_version", "num_decode_workers"]

# Large enough to hide the cost of a task, small enough to share a batch evenly.
_IMAGES_PER_TASK = 8
# Enough that no process waits while the next batch is used.
_TASKS_AHEAD = 2
_CHANNELS = 3
_TOKENS = count()


def num_decode_workers(setting: int | Literal["auto"]) -> int:
    """Returns the number of processes that `runtime.decode_workers` means.

    Ranks that torchrun starts on one machine share its cores.
    """
    if setting != "auto":
        return setting
    if sys.platform != "linux":
        return 0
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def decoder_version() -> str:
    """Returns which libraries turn bytes into pixels, in which versions."""
    import PIL
    from PIL import features

    codecs = ("libjpeg_turbo", "jpg", "webp")
    versions = [features.version(name) for name in codecs]
    return f"Pillow {PIL.__version__}, {', '.join(map(str, versions))}"


def decode_into(
    target: NDArray[np.uint8],
    store: Store,
    framing: Framing,
    rows: Sequence[int],
    numbers: NDArray[np.float64] | None,
) -> None:
    """Decodes images, and writes the canvases of each.

    Args:
        target: (M, J, H, W, C), written.
        store: Where the images are.
        framing: What canvases show.
        rows: M rows of the store.
        numbers: (M, K, 22), the random numbers of each, or None.

    Raises:
        DataError: An image is damaged or does not decode; named by its index.
    """
    from PIL import Image

    size = (framing.side, framing.side)
    for place, row in enumerate(rows):
        image = EncodedImage(store.read(row), "store", store.place(row))
        with opened_as_rgb(image) as opened:
            own = None if numbers is None else numbers[place]
            for canvas, box in enumerate(framing.boxes(*opened.size, own)):
                part = opened.crop(box)  # whose edge no pixel beyond it may touch
                scaled = part.resize(size, Image.Resampling.BICUBIC)
                target[place, canvas] = np.asarray(scaled)


@final
class Decoder:
    """Decodes the rows of a store ahead of their use.

    Args:
        store: Where the images are.
        framing: What canvases show.
        num_workers: Processes; 0 decodes here, when a batch is asked for.
    """

    def __init__(self, store: Store, framing: Framing, *, num_workers: int) -> None:
        self._store = store
        self._framing = framing
        self._num_workers = num_workers
        self._ring: _Ring | None = None

    def batches(
        self,
        rows: NDArray[np.int64],
        sizes: Sequence[int],
        numbers: NDArray[np.float64] | None,
    ) -> Iterator[Tensor]:
        """Yields canvases (M, J, C, H, W) uint8, batch after batch.

        Each batch is overwritten when the one after it is asked for.

        Args:
            rows: (R,) rows of the store.
            sizes: Rows of every batch, R in all.
            numbers: (R, K, 22) random numbers of each row, or None.

        Raises:
            DataError: An image is damaged or does not decode; named by its index.
            ConfigError: A process has ended.
        """
        starts = [0, *accumulate(sizes)]
        parts = [slice(*pair) for pair in pairwise(starts)]
        decode = self._decode_in_workers if self._num_workers else self._decode_here
        for canvases in decode(rows, parts, numbers):
            yield torch.from_numpy(canvases).permute(0, 1, 4, 2, 3)  # (M, J, C, H, W)

    def _decode_here(
        self,
        rows: NDArray[np.int64],
        parts: Sequence[slice],
        numbers: NDArray[np.float64] | None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields (M, J, H, W, C), each decoded when it is asked for."""
        for part in parts:
            own = None if numbers is None else numbers[part]
            canvases = np.empty((part.stop - part.start, *self._shape), np.uint8)
            decode_into(canvases, self._store, self._framing, rows[part].tolist(), own)
            yield canvases

    def _decode_in_workers(
        self,
        rows: NDArray[np.int64],
        parts: Sequence[slice],
        numbers: NDArray[np.float64] | None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields (M, J, H, W, C), while others are decoded into the rest of a ring."""
        most = max(part.stop - part.start for part in parts)
        ring = self._ring_of(most)
        pending: deque[tuple[NDArray[np.uint8], list[Future[None]]]] = deque()
        try:
            for number, part in enumerate(parts):
                slot = number % ring.num_slots
                tasks = self._submit(ring, slot, rows, part, numbers)
                canvases = ring.canvases[slot, : part.stop - part.start]
                pending.append((canvases, tasks))
                if len(pending) == ring.num_slots:
                    yield self._finished(*pending.popleft())
            while pending:
                yield self._finished(*pending.popleft())
        finally:  # nothing may write into the ring once others use it
            rest = [task for _, tasks in pending for task in tasks]
            wait([task for task in rest if not task.cancel()])

    def _submit(
        self,
        ring: "_Ring",
        slot: int,
        rows: NDArray[np.int64],
        part: slice,
        numbers: NDArray[np.float64] | None,
    ) -> list["Future[None]"]:
        """Starts to decode one batch into a slot of the ring."""
        pool = _pool(self._num_workers)
        tasks = []
        for start in range(part.start, part.stop, _IMAGES_PER_TASK):
            own = slice(start, min(start + _IMAGES_PER_TASK, part.stop))
            task = _Task(
                ring=ring.address,
                slot=slot,
                first=start - part.start,
                store=self._store.path,
                digest=self._store.fingerprint(),
                framing=self._framing,
                rows=tuple(rows[own].tolist()),
                numbers=None if numbers is None else numbers[own],
            )
            tasks.append(pool.submit(_decode_task, task))
        return tasks

    def _finished(
        self, canvases: NDArray[np.uint8], tasks: Sequence["Future[None]"]
    ) -> NDArray[np.uint8]:
        """Returns a batch once all of it is decoded."""
        try:
            for task in tasks:
                task.result()
        except (BrokenProcessPool, CancelledError) as error:
            _pool.cache_clear()
            rule = "a process that decodes images has ended, perhaps out of memory"
            remedy = "lower it, and go on with --resume"
            raise ConfigError(
                fault("runtime.decode_workers", self._num_workers, rule, remedy)
            ) from error
        return canvases

    def _ring_of(self, batch_size: int) -> "_Ring":
        """Returns shared memory for batches of at most some size."""
        if self._ring is None or self._ring.batch_size < batch_size:
            ahead = _TASKS_AHEAD * self._num_workers * _IMAGES_PER_TASK
            num_slots = 2 + -(-ahead // batch_size)
            self._ring = _Ring((num_slots, batch_size, *self._shape))
        return self._ring

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape (J, H, W, C) of one image's canvases."""
        side = self._framing.side
        return (self._framing.num_canvases, side, side, _CHANNELS)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Address:
    """Where another process finds shared memory; `token` tells it from earlier ones."""

    process: int
    file: int
    token: int
    shape: tuple[int, ...]


@final
class _Ring:
    """Memory that this process and its workers share, and that ends with them.

    It has no name and no file, so that nothing is left behind by a process that is
    killed, and it does not count against the size of /dev/shm.

    Attributes:
        canvases: (slots, M, J, H, W, C) uint8.
        address: How workers find it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        file = os.memfd_create("dpsgd-canvases")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, size)
        memory = mmap.mmap(file, size)
        self.canvases = np.frombuffer(memory, np.uint8).reshape(shape)
        self.address = _Address(
            process=os.getpid(), file=file, token=next(_TOKENS), shape=shape
        )

    @property
    def num_slots(self) -> int:
        """Batches held at once."""
        return len(self.canvases)

    @property
    def batch_size(self) -> int:
        """Largest batch."""
        return self.canvases.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """Some rows of one batch, and where their canvases go."""

    ring: _Address
    slot: int
    first: int
    store: Path
    digest: str
    framing: Framing
    rows: tuple[int, ...]
    numbers: NDArray[np.float64] | None


@lru_cache(maxsize=1)
def _pool(num_workers: int) -> ProcessPoolExecutor:
    """Returns the processes that decode, shared by all stores of this process."""
    return ProcessPoolExecutor(
        num_workers,
        # Not forked: threads and CUDA do not survive that.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
    )


def _begin_worker() -> None:
    """Lets a worker end with its parent, and with nothing else."""
    # Ctrl-C and a manager's signal to the group are for the parent, which then saves.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent has, however that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


def _decode_task(task: _Task) -> None:
    """Does a task in a worker."""
    place = slice(task.first, task.first + len(task.rows))
    target = _shared(task.ring)[task.slot, place]
    store = _opened(task.store, task.digest)
    decode_into(target, store, task.framing, task.rows, task.numbers)


@lru_cache(maxsize=4)
def _shared(address: _Address) -> NDArray[np.uint8]:
    """Returns the parent's memory."""
    path = f"/proc/{address.process}/fd/{address.file}"
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    return np.frombuffer(memory, np.uint8).reshape(address.shape)


@lru_cache(maxsize=4)
def _opened(path: Path, digest: str) -> Store:
    """Returns a store, opened once by each worker; `digest` tells it from others."""
    del digest
    return Store(path)
