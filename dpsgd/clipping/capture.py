"""Replays a pass of fixed shapes from a CUDA graph: one launch instead of thousands."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CapturedFunction", "Recording", "garbage_collected_before"]

_WARM_UPS = 3
_MOST_RECORDINGS = 2  # whole microbatches, and the half one that ends a draw

Tensors = tuple[Tensor, ...]


class CapturedFunction:
    """A function of tensors that is recorded once for each set of shapes.

    Recordings share their memory, because no two of them run at a time.

    Args:
        function: Takes a tuple of tensors that are changed in place between calls, at
            fixed addresses, and tensors that are new at every call; returns a tuple
            of tensors. It must not synchronise with the CPU.
    """

    def __init__(self, function: Callable[[Tensors, Tensors], Tensors]) -> None:
        self._function = function
        self._addresses: Any = None
        self._recordings: dict[Any, Recording] = {}
        self._memory: Any = None

    def __call__(self, fixed: Tensors, inputs: Tensors) -> Tensors:
        """Returns what the function returns; valid until the next call.

        Args:
            fixed: Tensors read where they lie.
            inputs: Tensors that are copied.
        """
        addresses = tuple((one.data_ptr(), one.shape, one.dtype) for one in fixed)
        shapes = tuple((one.shape, one.dtype) for one in inputs)
        is_full = len(self._recordings) == _MOST_RECORDINGS
        if addresses != self._addresses or (is_full and shapes not in self._recordings):
            self._recordings.clear()  # give the old memory back first
            self._addresses, self._memory = addresses, torch.cuda.graph_pool_handle()
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(fixed, inputs)
        recording = self._recordings[shapes]
        torch._foreach_copy_(list(recording.inputs), list(inputs))
        recording.graph.replay()
        return recording.outputs

    def _record(self, fixed: Tensors, inputs: Tensors) -> "Recording":
        """Runs the function until it is warm, then records it."""
        inputs = tuple(one.clone() for one in inputs)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._function(fixed, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with garbage_collected_before(), torch.cuda.graph(graph, pool=self._memory):
            outputs = self._function(fixed, inputs)
        return Recording(graph, inputs, outputs)


@contextlib.contextmanager
def garbage_collected_before() -> Iterator[None]:
    """Collects garbage on entering, and none until leaving.

    An older graph that the collector destroys while another is recorded calls what CUDA
    does not permit then, and spoils the recording.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        gc.collect()
        yield
    finally:
        if was_enabled:
            gc.enable()


class Recording(NamedTuple):
    """A graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors
