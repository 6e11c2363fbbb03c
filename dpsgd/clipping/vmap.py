"""The reference engine: torch.func.vmap over torch.func.grad, then clip and sum."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from dpsgd.clipping.base import ClippedGrad, LossFn, PassStatistics, clip_factors
from dpsgd.clipping.capture import CapturedFunction
from dpsgd.kernels import clip_accumulate_
from dpsgd.trees import Params, zeros_like

# One long float32 sum loses up to 1e-3 of a large leaf's norm, always downwards, which
# would let an example past the bound; a sum of short sums keeps 1e-7.
_PIECE = 1024

__all__ = ["Execution", "VmapClippedGrad", "per_sample_grads", "per_sample_norms"]

Execution = Literal["eager", "compile", "cuda_graph"]


def per_sample_grads(
    loss_fn: LossFn, params: Params, *batch: Tensor
) -> tuple[Params, Tensor]:
    """Returns each example's gradient and loss.

    Guarantees:
        Row m depends on example m alone: `loss_fn` is shown one example at a time.

    Args:
        loss_fn: `loss_fn(params, *example)`, the scalar loss of one example.
        params: Trainable parameters by name.
        *batch: Tensors whose first axis counts the M >= 1 examples.

    Returns:
        Gradients (M, ...) by name, and losses (M,).

    Source: Abadi et al. 2016, Algorithm 1, "Compute gradient" (arXiv:1607.00133).
    """
    in_dims = (None, *(0 for _ in batch))
    grads, losses = vmap(grad_and_value(loss_fn), in_dims)(params, *batch)
    return grads, losses


def per_sample_norms(grads: Params) -> Tensor:
    """Returns the L2 norm of each example's gradient over all leaves together.

    Guarantees:
        Formed in float32 or wider. A gradient with an inf or NaN, or whose square
        overflows, has a norm that is not finite.

    Args:
        grads: (M, ...) per-sample gradients by name.

    Returns:
        (M,) norms in gradient units.

    Source: Abadi et al. 2016, Algorithm 1, "Clip gradient" (arXiv:1607.00133).
    """
    piece_norms: list[Tensor] = []
    for leaf in grads.values():
        wide = torch.promote_types(leaf.dtype, torch.float32)
        rows = leaf.unsqueeze(1).flatten(1)  # (M, P), also of scalars
        whole = rows.shape[1] // _PIECE * _PIECE
        pieces = rows[:, :whole].view(len(rows), -1, _PIECE)  # (M, P / 1024, 1024)
        norms = torch.linalg.vector_norm(pieces, dim=2, dtype=wide)
        piece_norms.append(torch.linalg.vector_norm(norms, dim=1))
        rest = rows[:, whole:]
        piece_norms.append(torch.linalg.vector_norm(rest, dim=1, dtype=wide))
    total: Tensor = torch.linalg.vector_norm(torch.stack(piece_norms), dim=0)
    return total


class VmapClippedGrad(ClippedGrad):
    """Holds the per-sample gradients of one microbatch, and reads them twice.

    Args:
        execution: `eager`; `compile` compiles gradients and norms with torch.compile;
            `cuda_graph` records the whole pass once and replays it, on CUDA. The last
            two want a fixed microbatch size, and where they fail, warn and go on
            without. Speed only.

    The other arguments, the guarantees and the errors are those of `ClippedGrad`.
    """

    def __init__(
        self, loss_fn: LossFn, *, execution: Execution = "eager", **bound: Any
    ) -> None:
        super().__init__(loss_fn, **bound)
        self.execution: Execution = execution
        self._names: tuple[str, ...] = ()
        self._recorded = CapturedFunction(self._recordable_pass)
        self._compiled = _gradients_and_norms
        if execution == "compile":
            self._compiled = torch.compile(
                _gradients_and_norms, fullgraph=True, dynamic=False
            )

    def accumulate(
        self, clipped_sum: Params, params: Params, *batch: Tensor, mask: Tensor
    ) -> PassStatistics:
        """Adds one microbatch's clipped gradients to `clipped_sum` in place."""
        with torch.no_grad():
            outputs = self._replayed(params, *batch, mask)
            if outputs is None:
                return self._pass(clipped_sum, params, *batch, mask)
            totals = [clipped_sum[name] for name in params]
            torch._foreach_add_(totals, list(outputs[: len(params)]))
            statistics = (one.clone() for one in outputs[len(params) :])
            return PassStatistics(*statistics)

    def _pass(
        self, clipped_sum: Params, params: Params, *batch_and_mask: Tensor
    ) -> PassStatistics:
        """Takes the pass, operator by operator."""
        *batch, mask = batch_and_mask
        grads, norms, losses = self._gradients_and_norms(params, *batch)
        norms = norms.float()  # what float32 cannot hold contributes zero
        finite = torch.isfinite(norms)
        factors = torch.where(mask, clip_factors(norms, self.clipping_norm), 0.0)
        factors *= self.l2_sensitivity / self.clipping_norm
        for name, total in clipped_sum.items():
            clip_accumulate_(total, grads[name], factors)
        return PassStatistics(
            torch.where(mask, losses.float(), 0.0),
            torch.where(mask, norms, 0.0),
            (mask & ~finite).sum(),
            mask.sum(),
        )

    def _replayed(
        self, params: Params, *batch_and_mask: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Returns what the recorded pass gives; None if there is to be none.

        It touches no running sum, so that a pass which fails here and is then taken
        eagerly is added once.
        """
        if self.execution != "cuda_graph" or not batch_and_mask[-1].is_cuda:
            return None
        self._names = tuple(params)
        try:
            return self._recorded(tuple(params.values()), batch_and_mask)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._go_on_eagerly(error)
            return None

    def _recordable_pass(
        self, leaves: tuple[Tensor, ...], batch_and_mask: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Takes the pass into sums of its own."""
        params = dict(zip(self._names, leaves, strict=True))
        sums = zeros_like(params)
        one = self._pass(sums, params, *batch_and_mask)
        return (
            *sums.values(),
            *(one.losses, one.per_sample_norms, one.num_nonfinite, one.num_examples),
        )

    def _gradients_and_norms(
        self, params: Params, *batch: Tensor
    ) -> tuple[Params, Tensor, Tensor]:
        """Runs the compiled function if it is wanted and works, else the plain one."""
        if self.execution == "compile":
            # Imported here: dynamo takes seconds that an eager run need not spend.
            from torch._dynamo.exc import TorchDynamoException

            try:
                return self._compiled(self.loss_fn, params, *batch)
            except TorchDynamoException as error:
                self._go_on_eagerly(error)
        return _gradients_and_norms(self.loss_fn, params, *batch)

    def _go_on_eagerly(self, error: Exception) -> None:
        """Says that the wanted execution failed, and gives it up."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"runtime.execution={self.execution}: failed ({reason}); going on with "
            "eager, slower and with more memory",
            stacklevel=2,
        )
        self.execution = "eager"


def _gradients_and_norms(
    loss_fn: LossFn, params: Params, *batch: Tensor
) -> tuple[Params, Tensor, Tensor]:
    """Returns per-sample gradients, laid out row by row, their norms, and losses."""
    grads, losses = per_sample_grads(loss_fn, params, *batch)
    grads = {name: leaf.contiguous() for name, leaf in grads.items()}
    return grads, per_sample_norms(grads), losses
