"""How a pass runs: operator by operator, compiled, or recorded once and replayed."""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dpsgd.clipping.base import ClippedGrad, LossFn, PassStatistics, clip_factors
from dpsgd.clipping.capture import CapturedFunction
from dpsgd.trees import Params, zeros_like

__all__ = ["ExampleGrads", "Execution", "RecordedClippedGrad", "RecordedPass"]

Execution = Literal["eager", "compile", "cuda_graph"]


class ExampleGrads(Protocol):
    """The gradients of M examples, stored or not."""

    def per_sample_norms(self) -> Tensor:
        """Returns the L2 norm (M,) of each over all leaves together."""
        ...

    def add_to(self, totals: Params, factors: Tensor) -> None:
        """Adds to `totals` each gradient times its factor; none where that is 0."""
        ...


class RecordedPass:
    """A pass over one microbatch that may be recorded in a CUDA graph and replayed.

    Args:
        take: `take(sums, params, *batch, mask)` adds what the pass gives to `sums` in
            place and returns its statistics, without waiting for the device.
        execution: `cuda_graph` records, on CUDA, a pass of each shape once; all else
            takes it operator by operator. Where recording fails, this warns and goes
            on with `eager`. Speed only.

    Attributes:
        execution: How passes run now.
    """

    def __init__(
        self, take: Callable[..., PassStatistics], execution: Execution
    ) -> None:
        self._take = take
        self.execution: Execution = execution
        self._names: tuple[str, ...] = ()
        self._recorded = CapturedFunction(self._recordable_pass)

    def __call__(
        self, sums: Params, params: Params, *batch_and_mask: Tensor
    ) -> PassStatistics:
        """Adds one microbatch's gradients to `sums` in place."""
        with torch.no_grad():
            outputs = self._replayed(sums, params, *batch_and_mask)
            if outputs is None:
                return self._take(sums, params, *batch_and_mask)
            totals = [sums[name] for name in params]
            torch._foreach_add_(totals, list(outputs[: len(params)]))
            statistics = (one.clone() for one in outputs[len(params) :])
            return PassStatistics(*statistics)

    def _replayed(
        self, sums: Params, params: Params, *batch_and_mask: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Returns what the recorded pass gives; None if there is to be none.

        It touches no running sum, so that a pass which fails here and is then taken
        eagerly is added once.
        """
        if self.execution != "cuda_graph" or not batch_and_mask[-1].is_cuda:
            return None
        self._names = tuple(params)
        # Empty: its dtype says how to sum, and a recording is kept for it alone.
        typed = next(iter(sums.values())).new_empty(0)
        try:
            return self._recorded(tuple(params.values()), (typed, *batch_and_mask))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.go_on_eagerly(error)
            return None

    def _recordable_pass(
        self, leaves: tuple[Tensor, ...], typed_batch_and_mask: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Takes the pass into sums of its own."""
        typed, *batch_and_mask = typed_batch_and_mask
        params = dict(zip(self._names, leaves, strict=True))
        sums = zeros_like(params, typed.dtype)
        one = self._take(sums, params, *batch_and_mask)
        return (
            *sums.values(),
            *(one.losses, one.per_sample_norms, one.num_nonfinite, one.num_examples),
        )

    def go_on_eagerly(self, error: Exception) -> None:
        """Says that the wanted execution failed, and gives it up."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"runtime.execution={self.execution}: failed ({reason}); going on with "
            "eager, slower and with more memory",
            stacklevel=2,
        )
        self.execution = "eager"


class RecordedClippedGrad(ClippedGrad):
    """An engine whose pass may be recorded.

    Args:
        execution: As for `RecordedPass`; `compile` as the engine understands it. All
            but `eager` want a fixed microbatch size.

    The other arguments, the guarantees and the errors are those of `ClippedGrad`.
    """

    def __init__(
        self, loss_fn: LossFn, *, execution: Execution = "eager", **bound: Any
    ) -> None:
        super().__init__(loss_fn, **bound)
        self._run = RecordedPass(self._pass, execution)

    @property
    def execution(self) -> Execution:
        """How passes run now."""
        return self._run.execution

    @abstractmethod
    def _example_grads(
        self, params: Params, *batch: Tensor
    ) -> tuple[ExampleGrads, Tensor]:
        """Returns the gradients of M examples, in whatever form, and (M,) losses."""

    def _pass(
        self, clipped_sum: Params, params: Params, *batch_and_mask: Tensor
    ) -> PassStatistics:
        """Takes the pass, operator by operator."""
        *batch, mask = batch_and_mask
        grads, losses = self._example_grads(params, *batch)
        norms = grads.per_sample_norms().float()  # beyond float32 contributes zero
        finite = torch.isfinite(norms)
        factors = torch.where(mask, clip_factors(norms, self.clipping_norm), 0.0)
        factors *= self.l2_sensitivity / self.clipping_norm
        grads.add_to(clipped_sum, factors)
        return PassStatistics(
            torch.where(mask, losses.float(), 0.0),
            torch.where(mask, norms, 0.0),
            (mask & ~finite).sum(),
            mask.sum(),
        )

    def accumulate(
        self, clipped_sum: Params, params: Params, *batch: Tensor, mask: Tensor
    ) -> PassStatistics:
        """Adds one microbatch's clipped gradients to `clipped_sum` in place."""
        return self._run(clipped_sum, params, *batch, mask)
