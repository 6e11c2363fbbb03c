"""Sums of clipped per-sample gradients, with their sensitivity."""

from dpsgd.clipping.base import (
    ClippedGrad,
    ClippedGrads,
    Engine,
    LossFn,
    PassStatistics,
    clip_factors,
)
from dpsgd.clipping.execution import Execution, RecordedClippedGrad, RecordedPass
from dpsgd.clipping.ghost import GhostClippedGrad
from dpsgd.clipping.memory import MicrobatchMemory, measure_microbatch
from dpsgd.clipping.vmap import (
    VmapClippedGrad,
    clipping_slack,
    per_sample_grads,
    per_sample_norms,
)

__all__ = [
    "ClippedGrad",
    "ClippedGrads",
    "Engine",
    "Execution",
    "GhostClippedGrad",
    "LossFn",
    "MicrobatchMemory",
    "PassStatistics",
    "RecordedPass",
    "clip_factors",
    "clipped_grad",
    "clipping_slack",
    "measure_microbatch",
    "per_sample_grads",
    "per_sample_norms",
]

_ENGINES: dict[Engine, type[RecordedClippedGrad]] = {
    "vmap": VmapClippedGrad,
    "ghost": GhostClippedGrad,
}


def clipped_grad(
    loss_fn: LossFn,
    *,
    clipping_norm: float,
    rescale_to_unit_norm: bool = False,
    microbatch_size: int | None = None,
    engine: Engine = "vmap",
    execution: Execution = "eager",
) -> ClippedGrad:
    r"""Returns a function that sums clipped per-example gradients of `loss_fn`.

    Guarantees:
        The sum changes by at most `l2_sensitivity` when one example is added or
        removed, in L2 norm over all leaves together, to float32 rounding. Examples
        with a gradient that is not finite, and padding, contribute zero.

    Args:
        loss_fn: `loss_fn(params, *example)`, the scalar loss of one example; average
            the K views of an example inside it.
        clipping_norm: Bound C on the L2 norm of one example's gradient, > 0.
        rescale_to_unit_norm: Divide clipped gradients by C; the sensitivity is then 1.
        microbatch_size: Examples a pass; None takes a batch in one. Memory only.
        engine: `vmap` holds the per-sample gradients of a pass; `ghost` takes norms
            layer by layer, and stores only what is cheap to store. Speed and memory.
        execution: `eager`, `compile` or `cuda_graph`; the latter two are worth it for
            many passes of one size. Speed only.

    Returns:
        A callable `(params, *batch, mask=None) -> ClippedGrads` with the attribute
        `l2_sensitivity`.

    Raises:
        ValueError: `clipping_norm` or `microbatch_size` is not positive.

    Source: Abadi et al. 2016, Algorithm 1 (arXiv:1607.00133).

    >>> import torch
    >>> def loss_fn(params, x):
    ...     return (params["w"] * x).sum()
    >>> grad_fn = clipped_grad(loss_fn, clipping_norm=1.0)
    >>> batch = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    >>> grads = grad_fn({"w": torch.zeros(2)}, batch)
    >>> grads.clipped_sum["w"], grads.per_sample_norms, grad_fn.l2_sensitivity
    (tensor([0.6000, 1.3000]), tensor([5.0000, 0.5000]), 1.0)
    """
    return _ENGINES[engine](
        loss_fn,
        clipping_norm=clipping_norm,
        rescale_to_unit_norm=rescale_to_unit_norm,
        microbatch_size=microbatch_size,
        execution=execution,
    )
