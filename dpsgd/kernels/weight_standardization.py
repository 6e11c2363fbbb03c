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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
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
]

_EPS = 1e-4
_ELEMENTS = 4096  # gradients that a program holds
_NUM_WARPS = 8


class Standardization(NamedTuple):
    """How effective weights follow from raw ones.

    Attributes:
        unit: (O, KH, KW, I) weights su, of mean 0 and norm s in each row.
        factor: (O,) sr, by which centred raw weights were multiplied.
        follows: (O,) a/s^2, where a is 1 if r follows from the weights, else 0.
        gain: (O,) parameter gamma.
    """

    unit: Tensor
    factor: Tensor
    follows: Tensor
    gain: Tensor


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

    Args:
        grads: (M, O, KH, KW, I) gradients g, contiguous; left as they are.
        standardization: Of the weights.

    Returns:
        (M,) float32, or wider if `grads` is.
    """
    on_triton = runs_on_triton(grads) and grads.dtype != torch.float64
    run = unstandardized_norms_triton if on_triton else unstandardized_norms_reference
    return run(grads, standardization)


def standardize_reference(
    weight: Tensor, gain: Tensor, dtype: torch.dtype, *, scale: float = 1.0
) -> tuple[Tensor, Standardization]:
    """Does what `standardize` does, in PyTorch."""
    # Not torch.var_mean, which takes ten times as long on the CPU.
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    squared_norm = centred.square().sum((1, 2, 3), keepdim=True)
    factor = torch.rsqrt(squared_norm.clamp(min=_EPS)) * scale
    follows = (squared_norm >= _EPS).to(weight.dtype) / scale**2
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

    One example after the other, whose gradient then stays in a CPU's cache.
    """
    squares = []
    for grad in grads.split(1):
        raw, along = _unstandardized(grad, standardization)
        squares.append(raw.square_().sum((1, 2)) + along.square().sum(1))
    return torch.cat(squares)


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


def standardize_triton(
    weight: Tensor, gain: Tensor, dtype: torch.dtype, *, scale: float = 1.0
) -> tuple[Tensor, Standardization]:
    """Does what `standardize` does, in one Triton launch."""
    weight = weight.contiguous()
    unit, effective = torch.empty_like(weight), torch.empty_like(weight, dtype=dtype)
    factor, follows = torch.empty_like(gain), torch.empty_like(gain)
    fan_in = weight[0].numel()
    _standardize_kernel[(len(weight),)](
        weight,
        gain,
        unit,
        effective,
        factor,
        follows,
        fan_in,
        scale,
        EPS=_EPS,
        BLOCK=triton.next_power_of_2(fan_in),
        num_warps=_NUM_WARPS,
    )
    return effective, Standardization(unit, factor, follows, gain)


def unstandardize_triton_(grads: Tensor, standardization: Standardization) -> Tensor:
    """Does what `unstandardize_` does, in one Triton launch."""
    along = torch.empty(grads.shape[:2], device=grads.device, dtype=torch.float32)
    _launch_unstandardize(grads, standardization, grads, along, stores=True)
    return along


def unstandardized_norms_triton(
    grads: Tensor, standardization: Standardization
) -> Tensor:
    """Does what `unstandardized_norms` does, in one Triton launch and a sum."""
    squares = torch.empty(grads.shape[:2], device=grads.device, dtype=torch.float32)
    _launch_unstandardize(grads, standardization, grads, squares, stores=False)
    return squares.sum(1)


def _launch_unstandardize(
    grads: Tensor,
    standardization: Standardization,
    out: Tensor,
    rows: Tensor,
    *,
    stores: bool,
) -> None:
    """Stores gradients and those of the gain, or only the squared norm of each row."""
    assert grads.is_contiguous()
    num_examples, out_channels = rows.shape
    fan_in = math.prod(grads.shape[2:])
    block = triton.next_power_of_2(fan_in)
    examples = max(1, min(_ELEMENTS // block, triton.next_power_of_2(num_examples)))
    _unstandardize_kernel[(out_channels, triton.cdiv(num_examples, examples))](
        grads,
        *standardization,
        out,
        rows,
        num_examples,
        fan_in,
        STORES=stores,
        EXAMPLES=examples,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )


if triton is not None:

    @triton.jit
    def _standardize_kernel(
        weight,
        gain,
        unit,
        effective,
        factor,
        follows,
        fan_in,
        scale,
        EPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program: one output channel."""
        row = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < fan_in
        at = row.to(tl.int64) * fan_in + column
        value = tl.load(weight + at, mask=inside, other=0.0)
        value = tl.where(inside, value - tl.sum(value) / fan_in, 0.0)
        squared_norm = tl.sum(value * value)
        multiplier = tl.rsqrt(tl.maximum(squared_norm, EPS)) * scale
        value *= multiplier
        tl.store(unit + at, value, mask=inside)
        value *= tl.load(gain + row)
        tl.store(effective + at, value.to(effective.dtype.element_ty), mask=inside)
        tl.store(factor + row, multiplier)
        is_above = tl.where(squared_norm >= EPS, 1.0, 0.0)
        tl.store(follows + row, is_above / (scale * scale))

    @triton.jit
    def _unstandardize_kernel(
        grads,
        unit,
        factor,
        follows,
        gain,
        out,
        rows,
        num_examples,
        fan_in,
        STORES: tl.constexpr,
        EXAMPLES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program: one output channel of some examples."""
        channel, out_channels = tl.program_id(0), tl.num_programs(0)
        example = tl.program_id(1) * EXAMPLES + tl.arange(0, EXAMPLES)
        column = tl.arange(0, BLOCK)
        exists = example < num_examples
        inside = exists[:, None] & (column < fan_in)[None, :]
        row = example.to(tl.int64) * out_channels + channel
        at = row[:, None] * fan_in + column[None, :]
        grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
        at_unit = unit + channel * fan_in + column
        direction = tl.load(at_unit, mask=column < fan_in, other=0.0)[None, :]
        along = tl.sum(grad * direction, axis=1)
        mean = tl.sum(grad, axis=1) / fan_in
        slope = tl.load(gain + channel) * tl.load(factor + channel)
        part = along * tl.load(follows + channel)
        result = (grad - mean[:, None] - direction * part[:, None]) * slope
        if STORES:
            tl.store(out + at, result, mask=inside)
            tl.store(rows + row, along, mask=exists)
        else:
            result = tl.where(inside, result, 0.0)
            squares = tl.sum(result * result, axis=1) + along * along
            tl.store(rows + row, squares, mask=exists)
