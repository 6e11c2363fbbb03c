"""Processes that are ranks of one run on this machine, joined by gloo, or NCCL on GPUs.

They are forked from a server that has imported everything already, so that starting
four of them costs less than a second.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed.fsdp  # here, once, in the server
from small_runs import small_config

from dpsgd.assembly import assemble
from dpsgd.checkpoint import CheckpointStore
from dpsgd.parallel import Ranks, joined
from dpsgd.privacy import EpsilonBound, PRVAccountant
from dpsgd.run import Run, TrainState
from dpsgd.trees import Params

_FROM_SERVER = multiprocessing.get_context("forkserver")
_SECONDS = 200  # of the longest scenario, on a loaded machine

Arrays = dict[str, np.ndarray[Any, Any]]


class NoAccount(PRVAccountant):
    """Says a figure at once: what ranks compute does not depend on it."""

    def epsilon(self, phases: Any, delta: float) -> EpsilonBound:
        return EpsilonBound(lower=1.0, estimate=1.0, upper=1.0)

    def epsilon_curve(self, *, steps: Any, **phase: Any) -> list[EpsilonBound]:
        return [EpsilonBound(lower=1.0, estimate=1.0, upper=1.0) for _ in steps]


class RankGroup:
    """So many ranks, joined once, that play one scenario after the other."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        _start_server()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [_FROM_SERVER.Pipe() for _ in range(size)]
        self._ends = [own for own, _ in pipes]
        self._processes = [
            _FROM_SERVER.Process(
                target=_be_rank, args=(rank, size, device, port, end), daemon=True
            )
            for rank, (_, end) in enumerate(pipes)
        ]
        for process, (_, end) in zip(self._processes, pipes, strict=True):
            process.start()
            end.close()  # or the death of its rank would not be seen

    def __call__(self, scenario: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `scenario(ranks, *arguments)` returns on each rank, in order.

        An exception comes back as the name of its type, and its message.
        """
        for end in self._ends:
            end.send((scenario, arguments))
        for rank, end in enumerate(self._ends):
            assert end.poll(_SECONDS), f"rank {rank} does not answer"
        return [end.recv() for end in self._ends]

    def close(self) -> None:
        """Ends the processes."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(_SECONDS)
            assert process.exitcode == 0


def alone(scenario: Callable[..., Any], *arguments: Any) -> Any:
    """What a scenario returns in this process, which nobody joins."""
    with without_account():
        return scenario(Ranks(), *arguments)


def without_account() -> Any:
    """Lets no run inside this context wait for its account."""
    accountants = {PRVAccountant.name: NoAccount}
    return mock.patch.dict("dpsgd.privacy.registry.ACCOUNTANTS", accountants)


def _start_server() -> None:
    """Starts the server, unless it runs; it finds modules by its environment alone."""
    _FROM_SERVER.set_forkserver_preload(["detectors", "rank_scenarios"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        forkserver.ensure_running()


def _be_rank(rank: int, size: int, device: str, port: int, end: Any) -> None:
    """Plays one rank until there is nothing left to play."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # it rounds float32 images to 10 bits
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    # Joined for shards, ranks can keep whole leaves as well.
    config = small_config({"runtime.parallel": "fsdp", "runtime.device": device})
    with without_account(), joined(config) as ranks:
        while (task := end.recv()) is not None:
            scenario, arguments = task
            try:
                found = scenario(ranks, *arguments)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            end.send(found)


def arrays(leaves: Params) -> Arrays:
    """Tensors as what one process can hand to another."""
    return {name: leaf.cpu().numpy().copy() for name, leaf in leaves.items()}


def run_of_ranks(
    folder: Path, changes: dict[str, Any], ranks: Ranks, *, resume: bool = False
) -> tuple[Run, TrainState]:
    """A run of these ranks, anew or from the newest checkpoint of a folder."""
    config = small_config(changes)
    store = CheckpointStore(folder, keep=config.runtime.keep_checkpoints)
    checkpoint = store.newest() if resume else None
    run, state, _ = assemble(config, store=store, checkpoint=checkpoint, ranks=ranks)
    return run, state


def whole_state(run: Run, state: TrainState) -> Arrays:
    """Parameters, averages and momenta, gathered."""
    whole = dict(run.layout.whole(state.params))
    found = {f"params/{name}": leaf for name, leaf in whole.items()}
    for name, leaf in run.layout.whole(state.ema or {}).items():
        found[f"ema/{name}"] = leaf
    for name, leaf in run.layout.whole(state.optimizer.momenta() or {}).items():
        found[f"momentum/{name}"] = leaf
    return arrays(found)
