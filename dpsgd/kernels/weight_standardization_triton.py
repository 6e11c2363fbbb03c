"""The kernels of `weight_standardization`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "EPS",
    "ROUNDINGS",
    "Standardization",
    "standardize_triton",
    "unstandardize_triton_",
    "unstandardized_norms_triton",
    "unstandardized_squares_triton",
]

EPS = 1e-4  # the least squared norm that centred weights are divided by
# Of sums of squares that cancel: a sum of some thousand terms is rounded to less than
# a hundred times what one term is. At most F / 128 + 7 additions follow each other in a
# row's three sums; were all of them rounded the worst way, 100 is about what F = 5,760
# would take, the widest convolution of our networks.
ROUNDINGS = 100
_ELEMENTS, _NUM_WARPS = 4096, 8  # gradients that a program holds
_TILE, _TILE_WARPS = 4096, 2  # gradients that a program reads at a time


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
        EPS=EPS,
        BLOCK=triton.next_power_of_2(fan_in),
        num_warps=_NUM_WARPS,
    )
    return effective, Standardization(unit, factor, follows, gain)


def unstandardize_triton_(grads: Tensor, standardization: Standardization) -> Tensor:
    """Does what `unstandardize_` does, in one Triton launch."""
    assert grads.is_contiguous()
    along = torch.empty(grads.shape[:2], device=grads.device, dtype=torch.float32)
    num_examples, out_channels = along.shape
    fan_in = math.prod(grads.shape[2:])
    block = triton.next_power_of_2(fan_in)
    examples = max(1, min(_ELEMENTS // block, triton.next_power_of_2(num_examples)))
    _unstandardize_kernel[(out_channels, triton.cdiv(num_examples, examples))](
        grads,
        *standardization,
        along,
        num_examples,
        fan_in,
        EXAMPLES=examples,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )
    return along


def unstandardized_norms_triton(
    grads: Tensor, standardization: Standardization
) -> Tensor:
    """Does what `unstandardized_norms` does, in one Triton launch and a sum.

    From sums over each row, so in one reading and without a row in registers.
    """
    assert grads.is_contiguous()
    squares = torch.empty(grads.shape[:2], device=grads.device, dtype=torch.float32)
    num_examples, out_channels = squares.shape
    fan_in = math.prod(grads.shape[2:])
    columns = 128 if fan_in % 128 == 0 else min(64, triton.next_power_of_2(fan_in))
    examples = min(_TILE // columns, triton.next_power_of_2(num_examples))
    _norms_kernel[(out_channels, triton.cdiv(num_examples, examples))](
        grads,
        *standardization,
        squares,
        num_examples,
        fan_in,
        EXAMPLES=examples,
        COLUMNS=columns,
        num_warps=_TILE_WARPS,
    )
    return squares.sum(1)


def unstandardized_squares_triton(
    moments: Tensor, standardization: Standardization
) -> Tensor:
    """Does what `unstandardized_squares` does, in one Triton launch."""
    _, num_examples, out_channels = moments.shape
    squares = torch.empty(num_examples, device=moments.device, dtype=torch.float32)
    _, factor, follows, gain = standardization
    _squares_kernel[(num_examples,)](
        moments.contiguous(),
        factor,
        follows,
        gain,
        squares,
        standardization.unit[0].numel(),
        out_channels,
        BLOCK=triton.next_power_of_2(out_channels),
    )
    return squares


if triton is not None:
    SLACK = tl.constexpr(ROUNDINGS * torch.finfo(torch.float32).eps)

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
    def _norms_kernel(
        grads,
        unit,
        factor,
        follows,
        gain,
        squares,
        num_examples,
        fan_in,
        EXAMPLES: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """One program: one output channel of some examples, a few columns at a time."""
        channel, out_channels = tl.program_id(0), tl.num_programs(0)
        example = tl.program_id(1) * EXAMPLES + tl.arange(0, EXAMPLES)
        exists = example < num_examples
        row = example.to(tl.int64) * out_channels + channel
        zero = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
        square, plain, along = zero, zero, zero
        for start in range(0, fan_in, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_in = column < fan_in
            mask = exists[:, None] & is_in[None, :]
            at = row[:, None] * fan_in + column[None, :]
            grad = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32)
            at_unit = unit + channel * fan_in + column
            direction = tl.load(at_unit, mask=is_in, other=0.0)
            square += grad * grad
            plain += grad
            along += grad * direction[None, :]
        slope = tl.load(gain + channel) * tl.load(factor + channel)
        result = _squared_norm(
            tl.sum(square, axis=1),
            tl.sum(plain, axis=1),
            tl.sum(along, axis=1),
            fan_in,
            tl.load(follows + channel),
            slope,
        )
        tl.store(squares + row, result, mask=exists)

    @triton.jit
    def _squares_kernel(
        moments,
        factor,
        follows,
        gain,
        squares,
        fan_in,
        out_channels,
        BLOCK: tl.constexpr,
    ):
        """One program: one example."""
        example = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, BLOCK)
        inside = channel < out_channels
        at = moments + example * out_channels + channel
        step = tl.num_programs(0) * out_channels
        slope = tl.load(gain + channel, mask=inside, other=0.0)
        slope *= tl.load(factor + channel, mask=inside, other=0.0)
        result = _squared_norm(
            tl.load(at, mask=inside, other=0.0),
            tl.load(at + step, mask=inside, other=0.0),
            tl.load(at + 2 * step, mask=inside, other=0.0),
            fan_in,
            tl.load(follows + channel, mask=inside, other=0.0),
            slope,
        )
        tl.store(squares + example, tl.sum(result))

    @triton.jit
    def _squared_norm(square, plain, along, fan_in, follows, slope):
        """Returns squared norms of rows from their moments, as the reference does."""
        rest = square - plain * plain / fan_in - follows * along * along
        rest = tl.maximum(rest, 0.0) + SLACK * square
        # NaN and inf pass through the bound only if the sum keeps them.
        is_finite = tl.abs(square) < float("inf")
        rest = tl.where(is_finite, rest, square)
        return rest * slope * slope + along * along

    @triton.jit
    def _unstandardize_kernel(
        grads,
        unit,
        factor,
        follows,
        gain,
        rows,
        num_examples,
        fan_in,
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
        tl.store(grads + at, result, mask=inside)
        tl.store(rows + row, along, mask=exists)
