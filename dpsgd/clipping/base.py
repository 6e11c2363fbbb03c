"""The contract of every gradient engine: a sum of clipped per-example gradients.

Abadi et al. 2016, Algorithm 1, lines "Compute gradient" and "Clip gradient", summed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpsgd.errors import fault
from dpsgd.trees import Params, zeros_like

__all__ = [
    "ClippedGrad",
    "ClippedGrads",
    "Engine",
    "LossFn",
    "PassStatistics",
    "clip_factors",
]

Engine = Literal["vmap", "ghost"]
LossFn = Callable[..., Tensor]

# Squares of gradients below 1e-23 vanish in float32; a bound near them cannot be kept.
_LEAST_NORM = 1e-12


def clip_factors(per_sample_norms: Tensor, clipping_norm: float) -> Tensor:
    """Returns the scale that brings each gradient inside the clipping ball.

    Guarantees:
        0 <= factor <= 1, and factor * norm <= clipping_norm (to float32 rounding)
        wherever the norm is finite.

    Args:
        per_sample_norms: (M,) L2 norms in gradient units; may hold inf or NaN.
        clipping_norm: Bound on the L2 norm, > 0, same units.

    Returns:
        (M,) float32, dimensionless; 0 where the norm is not finite; (0,) if M = 0.

    Raises:
        ValueError: `clipping_norm` is not positive and finite.

    Source: Abadi et al. 2016, Algorithm 1, "Clip gradient" (arXiv:1607.00133).
    """
    _check_clipping_norm(clipping_norm)
    # A zero norm divides to inf, which the clamp brings to 1.
    factors = (clipping_norm / per_sample_norms).clamp(max=1.0)
    finite = torch.isfinite(per_sample_norms)
    return torch.where(finite, factors, 0.0).to(torch.float32)


def _check_clipping_norm(clipping_norm: float) -> None:
    """Raises unless the bound is positive and finite."""
    if not _LEAST_NORM <= clipping_norm < math.inf:
        rule = "must be above 0, finite and at least 1e-12, where float32 norms end"
        raise ValueError(
            fault("privacy.clipping_norm", clipping_norm, rule, "the paper takes 1")
        )


@dataclass(frozen=True, slots=True)
class PassStatistics:
    """What one pass saw. Unprotected: computed from private data without noise.

    Attributes:
        losses: (M,) loss of each example, 0 where masked.
        per_sample_norms: (M,) float32 gradient norms before clipping, 0 where masked.
        num_nonfinite: () int64, examples left out because their norm is not finite.
        num_examples: () int64, examples that are not padding.
    """

    losses: Tensor
    per_sample_norms: Tensor
    num_nonfinite: Tensor
    num_examples: Tensor

    def sums(self, clipping_norm: float) -> Tensor:
        """Returns (5,) float64 sums over examples, where the pass was taken.

        In order: examples, those left out, losses, norms, norms above `clipping_norm`.
        """
        norms = self.per_sample_norms.nan_to_num()
        parts = (
            self.num_examples,
            self.num_nonfinite,
            self.losses.nan_to_num().sum(),
            norms.sum(),
            (norms > clipping_norm).sum(),
        )
        return torch.stack([part.double() for part in parts])


@dataclass(frozen=True, slots=True)
class ClippedGrads:
    """Sum of clipped per-example gradients of one batch.

    Attributes:
        clipped_sum: Float32 leaves like the parameters.
        per_sample_norms: (M,) float32 norms before clipping, 0 where masked.
        losses: (M,) losses, 0 where masked.
        num_nonfinite: () int64 examples that contributed zero.

    All of it is unprotected: `dpsgd.optim.noisy_grad` makes the sum private.
    """

    clipped_sum: Params
    per_sample_norms: Tensor
    losses: Tensor
    num_nonfinite: Tensor


class ClippedGrad(ABC):
    r"""Computes $\sum_i \mathrm{clip}_C(\nabla \ell(w; x_i))$, divided by C on request.

    Guarantees:
        Adding or removing one example changes the sum by at most `l2_sensitivity` in
        L2 norm over all leaves together (to float32 rounding), whatever its values:
        an example whose gradient is not finite contributes zero. The sum does not
        depend on `microbatch_size` beyond rounding. No batch size divides anything.

    Args:
        loss_fn: `loss_fn(params, *example)`, the scalar loss of one example.
        clipping_norm: Bound C on the L2 norm over all leaves together, > 0.
        rescale_to_unit_norm: Divide clipped gradients by C.
        microbatch_size: Examples a pass when called with a whole batch; None takes
            the batch in one pass. Memory only.

    Raises:
        ValueError: `clipping_norm` or `microbatch_size` is not positive.

    Source: Abadi et al. 2016, Algorithm 1 (arXiv:1607.00133); the rescaling: De et al.
    2022 (arXiv:2204.13650).
    """

    def __init__(
        self,
        loss_fn: LossFn,
        *,
        clipping_norm: float,
        rescale_to_unit_norm: bool = False,
        microbatch_size: int | None = None,
    ) -> None:
        _check_clipping_norm(clipping_norm)
        if microbatch_size is not None and microbatch_size < 1:
            rule = "must be at least 1"
            raise ValueError(
                fault("runtime.microbatch_size", microbatch_size, rule, "raise it")
            )
        self.loss_fn = loss_fn
        self.clipping_norm = clipping_norm
        self.rescale_to_unit_norm = rescale_to_unit_norm
        self.microbatch_size = microbatch_size

    @property
    def l2_sensitivity(self) -> float:
        """L2 bound on one example's part of the sum: C, or 1 if rescaled."""
        return 1.0 if self.rescale_to_unit_norm else self.clipping_norm

    @abstractmethod
    def accumulate(
        self, clipped_sum: Params, params: Params, *batch: Tensor, mask: Tensor
    ) -> PassStatistics:
        """Adds one microbatch's clipped gradients to `clipped_sum` in place.

        Args:
            clipped_sum: Float32 leaves like `params`, or float64 ones, in which sums
                do not depend on the order of examples beyond 1e-9.
            params: Trainable parameters by name.
            *batch: Tensors whose first axis counts the M examples of the microbatch.
            mask: (M,) bool, False for padding, which contributes zero.
        """

    def __call__(
        self, params: Params, *batch: Tensor, mask: Tensor | None = None
    ) -> ClippedGrads:
        """Returns the sum over a batch of any size, in passes of `microbatch_size`.

        Args:
            params: Trainable parameters by name.
            *batch: At least one tensor; first axes count the same M >= 0 examples.
            mask: (M,) bool, False for padding; None takes all examples.

        Raises:
            ValueError: The first axes differ, or there is no tensor.
        """
        num_rows = _batch_length(batch)
        if mask is None:
            mask = torch.ones(num_rows, dtype=torch.bool, device=batch[0].device)
        _batch_length((*batch, mask))
        clipped_sum = zeros_like(params)
        passes = [
            self.accumulate(clipped_sum, params, *part[:-1], mask=part[-1])
            for part in _microbatches((*batch, mask), self.microbatch_size or num_rows)
        ]
        empty = batch[0].new_zeros(0, dtype=torch.float32)
        return ClippedGrads(
            clipped_sum,
            torch.cat([empty, *(one.per_sample_norms for one in passes)])[:num_rows],
            torch.cat([empty, *(one.losses for one in passes)])[:num_rows],
            torch.stack(
                [empty.sum().long(), *(one.num_nonfinite for one in passes)]
            ).sum(),
        )


def _batch_length(batch: tuple[Tensor, ...]) -> int:
    """Returns the number of examples M, the same in all tensors."""
    lengths = {len(tensor) for tensor in batch}
    if len(lengths) != 1:
        shown = sorted(lengths) or "nothing"
        raise ValueError(
            fault("batch", shown, "tensors must share their first axis", "align them")
        )
    return lengths.pop()


def _microbatches(
    batch: tuple[Tensor, ...], microbatch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yields parts of equal length; the last is padded with zeros, mask False."""
    for start in range(0, len(batch[0]), max(microbatch_size, 1)):
        part = tuple(tensor[start : start + microbatch_size] for tensor in batch)
        missing = microbatch_size - len(part[0])
        if missing:
            part = tuple(
                torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
                for tensor in part
            )
        yield part
