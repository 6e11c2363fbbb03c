"""The reference engine: torch.func.vmap over torch.func.grad, then clip and sum."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from dpsgd.clipping.base import LossFn
from dpsgd.clipping.execution import ExampleGrads, Execution, RecordedClippedGrad
from dpsgd.kernels import clip_accumulate_
from dpsgd.trees import Params

# One long float32 sum loses up to 1e-3 of a large leaf's norm, always downwards, which
# would let an example past the bound; a sum of short sums keeps 1e-7.
_PIECE = 1024

__all__ = [
    "VmapClippedGrad",
    "clipping_slack",
    "per_sample_grads",
    "per_sample_norms",
]


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


def clipping_slack(params: Params, clipping_norm: float) -> float:
    r"""Bounds by how much rounding lets a clipped gradient pass its bound.

    In units of float32's $u = 2^{-24}$: a sum of m squares in any order is off by at
    most m of itself, its root by half of that. `per_sample_norms` takes three such
    sums one after the other, over at most 1024 elements, over the pieces of a leaf,
    and over two norms a leaf; then the factor is formed in three roundings. Squares
    below $2^{-126}$ may vanish.

    Guarantees:
        The L2 norm of factor times gradient, as real numbers, is at most
        (1 + returned value) times the bound.

    Args:
        params: Trainable parameters by name.
        clipping_norm: Bound C, >= 1e-12.

    Returns:
        A share of the bound, > 0: 5.36e-5 for a WRN-16-4 and a bound of 1.

    Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    """
    sizes = [leaf.numel() for leaf in params.values()]
    pieces = max(sizes) / _PIECE
    roundings = (_PIECE + pieces + 2 * len(sizes)) / 2 + 8
    vanished = math.sqrt(sum(sizes)) * 2.0**-63 / clipping_norm
    return 1.01 * roundings * 2.0**-24 + vanished  # 1.01 for products of errors


class VmapClippedGrad(RecordedClippedGrad):
    """Holds the per-sample gradients of one microbatch, and reads them twice.

    Args:
        execution: As for `RecordedClippedGrad`; `compile` compiles gradients and
            norms with torch.compile.

    The other arguments, the guarantees and the errors are those of `ClippedGrad`.
    """

    def __init__(
        self, loss_fn: LossFn, *, execution: Execution = "eager", **bound: Any
    ) -> None:
        super().__init__(loss_fn, execution=execution, **bound)
        self._compiled = _gradients_and_norms
        if execution == "compile":
            self._compiled = torch.compile(
                _gradients_and_norms, fullgraph=True, dynamic=False
            )

    def _example_grads(
        self, params: Params, *batch: Tensor
    ) -> tuple[ExampleGrads, Tensor]:
        """Runs the compiled function if it is wanted and works, else the plain one."""
        if self.execution == "compile":
            # Imported here: dynamo takes seconds that an eager run need not spend.
            from torch._dynamo.exc import TorchDynamoException

            try:
                grads, norms, losses = self._compiled(self.loss_fn, params, *batch)
                return _StoredGrads(grads, norms), losses
            except TorchDynamoException as error:
                self._run.go_on_eagerly(error)
        grads, norms, losses = _gradients_and_norms(self.loss_fn, params, *batch)
        return _StoredGrads(grads, norms), losses


class _StoredGrads(NamedTuple):
    """Per-sample gradients (M, ...) by name, and their norms (M,)."""

    grads: Params
    norms: Tensor

    def per_sample_norms(self) -> Tensor:
        """Returns the norms (M,)."""
        return self.norms

    def add_to(self, totals: Params, factors: Tensor) -> None:
        """Adds the gradients, times a factor each, to `totals`."""
        for name, total in totals.items():
            clip_accumulate_(total, self.grads[name], factors)


def _gradients_and_norms(
    loss_fn: LossFn, params: Params, *batch: Tensor
) -> tuple[Params, Tensor, Tensor]:
    """Returns per-sample gradients, laid out row by row, their norms, and losses."""
    grads, losses = per_sample_grads(loss_fn, params, *batch)
    grads = {name: leaf.contiguous() for name, leaf in grads.items()}
    return grads, per_sample_norms(grads), losses
