r"""Weight standardisation and its Jacobian, each in one pass over the weights.

Effective weights are $\hat w = \gamma u$ with $u = (w - \mu) r$ and
$r = (\max(\sum (w - \mu)^2, 10^{-4}))^{-1/2}$ in every output channel. With $g$ the
gradient of $\hat w$, F the fan-in and a = 1 where r follows from the weights, 0 where
the bound took its place: $\partial w = \gamma r (g - \bar g - a \, u \langle u, g
\rangle)$ and $\partial \gamma = \langle u, g \rangle$. The Jacobian is the same for
every example, so a sum of gradients may be formed before it is applied.

A constant s that multiplies the weights, such as that of a scaled activation before the
convolution, takes no pass of its own: with su for u, sr for r and a/s^2 for a all of
this holds as it stands.

Source: Qiao et al. 2019 (arXiv:1903.10520); scaled by fan-in and bounded as in Brock et
al. 2021 (arXiv:2101.08692) and their code. timm's ScaledStdConv2d adds a constant to
the variance in place of the bound.
"""

import torch
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton
from dpsgd.kernels.weight_standardization_triton import (
    EPS,
    ROUNDINGS,
    Standardization,
    standardize_triton,
    unstandardize_triton_,
    unstandardized_norms_triton,
    unstandardized_squares_triton,
)

__all__ = [
    "ROUNDINGS",
    "Standardization",
    "standardize",
    "standardize_reference",
    "standardize_triton",
    "unstandardize_",
    "unstandardize_reference_",
    "unstandardize_triton_",
    "unstandardized_norms",
    "unstandardized_norms_reference",
    "unstandardized_norms_triton",
    "unstandardized_squares",
    "unstandardized_squares_reference",
    "unstandardized_squares_triton",
]

_ELEMENTS = 1 << 18  # of the gradients that a CPU takes at a time: 1 MiB


def standardize(
    weight: Tensor, gain: Tensor, dtype: torch.dtype, *, scale: float = 1.0
) -> tuple[Tensor, Standardization]:
    """Returns effective weights.

    Args:
        weight: (O, KH, KW, I) raw weights.
        gain: (O,) scale of each output channel.
        dtype: Type of the effective weights.
        scale: Constant s > 0 by which they are multiplied.

    Returns:
        (O, KH, KW, I) effective weights, and how they follow from the raw ones, in
        the type of `weight`.
    """
    on_triton = runs_on_triton(weight) and weight.dtype == torch.float32
    run = standardize_triton if on_triton else standardize_reference
    return run(weight, gain, dtype, scale=scale)


def unstandardize_(grads: Tensor, standardization: Standardization) -> Tensor:
    """Turns gradients of effective weights into those of raw ones, in place.

    Args:
        grads: (M, O, KH, KW, I) gradients g, contiguous, overwritten.
        standardization: Of the weights.

    Returns:
        (M, O) gradients of the gain.
    """
    on_triton = runs_on_triton(grads) and grads.dtype == torch.float32
    run = unstandardize_triton_ if on_triton else unstandardize_reference_
    return run(grads, standardization)


def unstandardized_norms(grads: Tensor, standardization: Standardization) -> Tensor:
    """Returns squared norms of the gradients of raw weights and gain together.

    Guarantees:
        At least what they are in float32, to its rounding.

    Args:
        grads: (M, O, KH, KW, I) gradients g, contiguous; left as they are.
        standardization: Of the weights.

    Returns:
        (M,) float32, or wider if `grads` is.
    """
    on_triton = runs_on_triton(grads) and grads.dtype != torch.float64
    run = unstandardized_norms_triton if on_triton else unstandardized_norms_reference
    return run(grads, standardization)


def unstandardized_squares(moments: Tensor, standardization: Standardization) -> Tensor:
    r"""Returns squared norms of the gradients of raw weights and gain together.

    The part of g that is orthogonal to 1 and to u has the square
    $|g|^2 - F \bar g^2 - \langle u, g \rangle^2$, u being orthogonal to 1 and of norm 1
    itself; with su in its place the last is divided by s^2, which `follows` is.

    Guarantees:
        At least the norm that float32 gradients have: a bound on how far terms that
        cancel are rounded is added. Not finite where a sum is not.

    Args:
        moments: (3, M, O) sums over each row of g * g, g and g * su.
        standardization: Of the weights.

    Returns:
        (M,) float32, or wider if `moments` is.
    """
    on_triton = runs_on_triton(moments) and moments.dtype == torch.float32
    run = unstandardized_squares_reference
    run = unstandardized_squares_triton if on_triton else run
    return run(moments, standardization)


def standardize_reference(
    weight: Tensor, gain: Tensor, dtype: torch.dtype, *, scale: float = 1.0
) -> tuple[Tensor, Standardization]:
    """Does what `standardize` does, in PyTorch."""
    # Not torch.var_mean, which takes ten times as long on the CPU.
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    squared_norm = centred.square().sum((1, 2, 3), keepdim=True)
    factor = torch.rsqrt(squared_norm.clamp(min=EPS)) * scale
    follows = (squared_norm >= EPS).to(weight.dtype) / scale**2
    unit = centred * factor
    effective = (unit * gain.view(-1, 1, 1, 1)).to(dtype)
    return effective, Standardization(unit, factor.flatten(), follows.flatten(), gain)


def unstandardize_reference_(grads: Tensor, standardization: Standardization) -> Tensor:
    """Does what `unstandardize_` does, in PyTorch."""
    raw, along = _unstandardized(grads, standardization)
    grads.copy_(raw.view_as(grads))
    return along


def unstandardized_norms_reference(
    grads: Tensor, standardization: Standardization
) -> Tensor:
    """Does what `unstandardized_norms` does, in PyTorch.

    A few examples at a time, whose gradients then stay in a CPU's cache.
    """
    direction = standardization.unit.detach().flatten(1)  # (O, F)
    size = max(1, _ELEMENTS // direction.numel())
    wide = torch.promote_types(grads.dtype, torch.float32)
    products = direction.new_empty(size, *direction.shape, dtype=wide)
    squares = []
    for few in grads.split(size):
        flat, product = few.flatten(2).to(wide), products[: len(few)]
        square = torch.mul(flat, flat, out=product).sum(2)
        along = torch.mul(flat, direction, out=product).sum(2)
        moments = torch.stack([square, flat.sum(2), along])
        squares.append(unstandardized_squares_reference(moments, standardization))
    return torch.cat(squares)


def unstandardized_squares_reference(
    moments: Tensor, standardization: Standardization
) -> Tensor:
    """Does what `unstandardized_squares` does, in PyTorch."""
    unit, factor, follows, gain = standardization
    squares, plain, along = torch.unbind(moments)
    fan_in, eps = unit[0].numel(), torch.finfo(moments.dtype).eps
    projected = squares - plain.square() / fan_in - follows * along.square()
    projected = projected.clamp(min=0) + ROUNDINGS * eps * squares
    # NaN and inf pass through clamp's lower bound only if the sum keeps them.
    projected = torch.where(torch.isfinite(squares), projected, squares)
    rows = projected * (gain * factor).square() + along.square()
    return rows.sum(1)


def _unstandardized(
    grads: Tensor, standardization: Standardization
) -> tuple[Tensor, Tensor]:
    """Returns (M, O, F) gradients of raw weights and (M, O) of the gain."""
    unit, factor, follows, gain = standardization
    flat = grads.flatten(2).to(torch.promote_types(grads.dtype, torch.float32))
    direction = unit.flatten(1)  # (O, F)
    along = (flat * direction).sum(2)
    raw = flat - flat.mean(2, keepdim=True)
    raw.addcmul_((follows * along)[:, :, None], direction, value=-1)
    return raw.mul_((gain * factor)[:, None]), along
