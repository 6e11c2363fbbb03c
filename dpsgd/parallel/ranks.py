"""The processes of one run: who they are, what they tell each other, how they part.

Ranks exchange tensors and JSON, never pickles. What they exchange, clipped sums without
noise and the key of the noise among it, is as secret as the training data: the network
between machines must be trusted.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dpsgd.config import Config
from dpsgd.errors import ConfigError, RankError, fault

__all__ = ["Ranks", "joined"]

# Of one exchange within steps: less than the 30 s after which torchrun kills a rank
# that waits for one it has lost, so that there is time to say so.
_TIMEOUT: Final = timedelta(seconds=25)
# NCCL's own counts from when an exchange is asked for, maybe long before the device has
# taken the passes before it.
_NCCL_TIMEOUT: Final = timedelta(minutes=10)
_POLL_SECONDS: Final = 1e-4
_PAUSE_SECONDS: Final = 0.1
_PATIENCE: Final = timedelta(hours=1)  # for data to be read, and files to be written
_REMEDY = "start all ranks alike, with torchrun"


@final
@dataclass(kw_only=True, eq=False)
class Ranks:
    """All ranks of a run, seen from one of them; without arguments a run of one.

    A run of one meets nobody: every method gives back what it was given.

    Attributes:
        rank: This one, in [0, size). The first, 0, speaks and writes for all.
        size: How many there are; enters no divisor and no noise.
        local_rank: This one among those of its machine.
        device: Where tensors must be to be exchanged.
        mesh: What torch calls the ranks; None without a process group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None
    _store: Any = None
    _meetings: int = 0
    _own_work: Any = None  # a CUDA event before the first exchange not waited for

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Returns this rank's contiguous share of `count` things, maybe none.

        Guarantees:
            The shares of all ranks, in order, are all things, each once.

        >>> [Ranks(rank=rank, size=4).share(3) for rank in (0, 3)]
        [slice(0, 0, None), slice(2, 3, None)]
        """
        start = self.rank * count // self.size
        return slice(start, (self.rank + 1) * count // self.size)

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of all ranks' values, the same on every rank."""
        if self.size == 1:
            return values
        with self.exchanging("sum of counts"):
            result = values.to(self.device, copy=True)
            dist.all_reduce(result, dist.ReduceOp.SUM)
            self.wait()
            return result.to(values.device)

    def largest(self, value: int) -> int:
        """Returns the largest of all ranks' values."""
        if self.size == 1:
            return value
        with self.exchanging("request or fault of any rank"):
            result = torch.tensor(value, device=self.device)
            dist.all_reduce(result, dist.ReduceOp.MAX)
            self.wait()
            return int(result)

    def any(self, holds: bool) -> bool:
        """Returns whether something holds on any rank."""
        return bool(self.largest(int(holds)))

    def from_first(self, value: Any) -> Any:
        """Returns what the first rank says, a JSON value."""
        return self._from_all(value)[0]

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuses ranks that do not agree.

        Args:
            facts: JSON values by the names that a message may use; only digests of
                them are exchanged.

        Raises:
            ConfigError: On every rank, naming what differs from the first one.
        """
        own = {name: _digest(value) for name, value in facts.items()}
        first, *others = self._from_all(own)
        lines = []
        for rank, other in enumerate(others, start=1):
            odd = sorted(name for name in first if other.get(name) != first[name])
            if odd:
                rule = f"rank {rank} has another {', '.join(odd)} than rank 0"
                lines.append(fault("ranks", self.size, rule, _REMEDY))
        if lines:
            raise ConfigError("\n".join(lines))

    def meet(self) -> None:
        """Waits for all ranks, however long one of them reads or writes files.

        No exchange of tensors waits meanwhile, so that none times out; if a rank has
        died, its launcher ends the others.
        """
        if self.size == 1:
            return
        self._meetings += 1
        name = f"meeting {self._meetings}"
        with self.exchanging("meeting"):
            if self._store.add(name, 1) == self.size:
                self._store.set(f"{name}: all", "here")
            self._store.wait([f"{name}: all"], _PATIENCE)

    @contextmanager
    def one_first(self, what: str) -> Iterator[None]:
        """Lets one rank of each machine go ahead, as for a download; then the others.

        Args:
            what: A name that is used once in the run.
        """
        name = f"{what} on machine {os.environ.get('GROUP_RANK', '0')}"
        if self.size > 1 and self.local_rank > 0:
            self._store.wait([name], _PATIENCE)
        yield
        if self.size > 1 and self.local_rank == 0:
            self._store.set(name, "done")

    @contextmanager
    def exchanging(self, what: str) -> Iterator[None]:
        """Names the exchange in which another rank turned out to be lost.

        Args:
            what: What is exchanged inside this context.

        Raises:
            RankError: A connection broke, or nothing came in time.
        """
        if self.device.type == "cuda" and self._own_work is None:
            self._own_work = _recorded_event()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's and NCCL's errors are no narrower
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            rule = f"rank {self.rank} lost another one in the {what} ({reason})"
            remedy = "see its own message; go on with --resume, or torchrun's restarts"
            raise RankError(fault("ranks", self.size, rule, remedy)) from error

    def wait(self) -> None:
        """Waits until the device has taken part in all exchanges asked for.

        NCCL takes part when the device comes to it, and then waits for a lost rank
        without a word, so the clock is ours, and runs once all before it is done.

        Raises:
            RuntimeError: Nothing came in time.
        """
        if self.device.type != "cuda":
            return
        exchanges = _recorded_event()
        while self._own_work is not None and not self._own_work.query():
            time.sleep(_POLL_SECONDS)
        self._own_work = None
        latest = time.monotonic() + _TIMEOUT.total_seconds()
        while not exchanges.query():
            if time.monotonic() > latest:
                raise RuntimeError(f"nothing came in {_TIMEOUT.total_seconds():.0f} s")
            time.sleep(_POLL_SECONDS)

    def _from_all(self, value: Any) -> list[Any]:
        """Returns what every rank says, JSON values in the order of ranks."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        text = text.ljust(self.largest(len(text)))  # JSON may end in blanks
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        texts = [torch.empty_like(mine) for _ in range(self.size)]
        with self.exchanging("exchange of settings"):
            dist.all_gather(texts, mine)
            self.wait()
        return [json.loads(bytes(one.tolist())) for one in texts]


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started, for as long as the context lasts.

    Without torchrun, and with one process, the run is one of one rank. If an exception
    leaves the context on a GPU, the process group stays, because NCCL would wait in it
    for ranks that may not come: the process should end by `os._exit`.

    Args:
        config: Says how ranks work together, and where.

    Raises:
        ConfigError: Settings and launcher do not fit together.
        RankError: The others are not found.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    runtime = config.runtime
    _check(config, size, local_rank)
    if size == 1 and runtime.parallel != "fsdp":
        yield Ranks()
        return
    on_gpu = runtime.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        named = torch.device("cuda" if runtime.device == "auto" else runtime.device)
        device = torch.device(
            "cuda", local_rank if named.index is None else named.index
        )
        torch.cuda.set_device(device)
    ranks = Ranks(size=size, local_rank=local_rank, device=device)
    with contextlib.ExitStack() as stack:
        with ranks.exchanging("search for the others"):
            ranks.rank, ranks._store = _introduced(size)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=ranks._store,
                rank=ranks.rank,
                world_size=size,
                timeout=_NCCL_TIMEOUT if on_gpu else _TIMEOUT,
                device_id=device if on_gpu else None,
            )
            stack.callback(dist.destroy_process_group)
        ranks.mesh = init_device_mesh(device.type, (size,))
        try:
            yield ranks
        except BaseException:
            if on_gpu:
                stack.pop_all()
            raise
        if not on_gpu:
            # gloo's threads let go of tensors once they get the interpreter's lock; if
            # that is at its end, they abort the process.
            time.sleep(_PAUSE_SECONDS)


def _recorded_event() -> Any:
    """Returns an event that comes when the device has done all it was given."""
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _introduced(size: int) -> tuple[int, Any]:
    """Returns this process's rank, and the store where ranks leave word."""
    if size == 1:
        return 0, dist.HashStore()  # type: ignore[attr-defined]
    store, rank, _ = next(rendezvous("env://", timeout=_TIMEOUT))
    # torchrun keeps the store when it starts ranks again; they must not read old words.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return rank, PrefixStore(f"dpsgd, start {attempt}", store)


def _check(config: Config, size: int, local_rank: int) -> None:
    """Raises if the settings are not for as many processes as were started."""
    runtime, faults = config.runtime, []
    if size > 1 and config.privacy.noise == "secure":
        rule = f"{size} ranks would each draw their own"
        remedy = "start one process, or take standard noise"
        faults.append(fault("privacy.noise", "secure", rule, remedy))
    if size > 1 and runtime.feature_cache is not None:
        rule = f"is not for {size} ranks: on features a step is one matrix product"
        remedy = "start one process"
        faults.append(fault("runtime.feature_cache", "...", rule, remedy))
    if size > 1 and runtime.parallel == "none":
        rule = f"{size} processes were started, and would each train alone"
        remedy = "set ddp or fsdp, or start one process"
        faults.append(fault("runtime.parallel", "none", rule, remedy))
    if size > 1 and ":" in runtime.device:
        rule = f"names one device for {size} processes"
        remedy = "take auto, cuda or cpu"
        faults.append(fault("runtime.device", runtime.device, rule, remedy))
    count = torch.cuda.device_count()
    if runtime.device != "cpu" and torch.cuda.is_available() and local_rank >= count:
        rule = f"process {local_rank} of this machine has no device: it has {count}"
        remedy = "start at most one process a device"
        faults.append(fault("runtime.parallel", runtime.parallel, rule, remedy))
    if faults:
        raise ConfigError("\n".join(faults))


def _digest(value: Any) -> str:
    """Returns a digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
