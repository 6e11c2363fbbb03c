"""Replays a pass of fixed shapes from a CUDA graph: one launch instead of thousands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CapturedFunction"]

_WARM_UPS = 3

Tensors = tuple[Tensor, ...]


class CapturedFunction:
    """A function of tensors that is recorded once for each set of shapes.

    Args:
        function: Takes a tuple of tensors that are changed in place between calls, at
            fixed addresses, and tensors that are new at every call; returns a tuple
            of tensors. It must not synchronise with the CPU.
    """

    def __init__(self, function: Callable[[Tensors, Tensors], Tensors]) -> None:
        self._function = function
        self._signature: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Tensors = ()
        self._outputs: Tensors = ()

    def __call__(self, fixed: Tensors, inputs: Tensors) -> Tensors:
        """Returns what the function returns; valid until the next call.

        Args:
            fixed: Tensors read where they lie.
            inputs: Tensors that are copied.
        """
        signature = (
            tuple((one.data_ptr(), one.shape, one.dtype) for one in fixed),
            tuple((one.shape, one.dtype) for one in inputs),
        )
        if signature != self._signature:
            self._record(fixed, inputs)
            self._signature = signature
        assert self._graph is not None
        torch._foreach_copy_(list(self._inputs), list(inputs))
        self._graph.replay()
        return self._outputs

    def _record(self, fixed: Tensors, inputs: Tensors) -> None:
        """Runs the function until it is warm, then records it."""
        self._graph, self._outputs = None, ()  # give the old memory back first
        self._inputs = tuple(one.clone() for one in inputs)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._function(fixed, self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._function(fixed, self._inputs)
