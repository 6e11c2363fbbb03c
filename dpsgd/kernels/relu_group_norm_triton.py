"""The kernels of `relu_group_norm`, for channels-last images."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["Affine", "relu_group_norm_backward_triton", "relu_group_norm_triton"]

Affine = tuple[Tensor, Tensor]

# A program walks over its image with this many elements a thread at a time, and adds up
# in registers: what does not fit there is spilled, at four times the cost. An image has
# enough threads that few are under way at once: the second reading finds them in
# the L2 cache.
_PER_THREAD = 32
_PER_WARP = 4096  # elements of an image for each of its warps


def relu_group_norm_triton(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    *,
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor, Tensor]:
    """Does what `relu_group_norm_forward` does, in one Triton launch."""
    x = x.contiguous(memory_format=torch.channels_last)
    num_images, channels, height, width = x.shape
    outputs = tuple(torch.empty_like(x) for _ in affines)
    total = None
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
        total = torch.empty_like(x)
    mean = torch.empty(num_images, num_groups, device=x.device)
    rstd = torch.empty_like(mean)
    _forward_kernel[(num_images,)](
        (x, x if residual is None else residual, x if total is None else total),
        x if bias is None else bias,
        (outputs[0], outputs[-1]),
        (mean, rstd),
        (*affines[0], *affines[-1]),
        height * width,
        eps,
        C=channels,
        GROUPS=num_groups,
        **_tiling(channels, height * width, num_outputs=1),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        OUTPUTS=len(affines),
    )
    return outputs, total, mean, rstd


def relu_group_norm_backward_triton(
    total: Tensor,
    bias: Tensor | None,
    grads_y: tuple[Tensor, ...],
    grad_total: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scales: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Does what `relu_group_norm_backward` does, in one Triton launch."""
    layout = torch.channels_last
    total = total.contiguous(memory_format=layout)
    grads_y = tuple(grad.contiguous(memory_format=layout) for grad in grads_y)
    if grad_total is not None:
        grad_total = grad_total.contiguous(memory_format=layout)
    num_images, channels, height, width = total.shape
    grad_x = torch.empty_like(total)
    # One for each scale, one for each shift, one for the bias.
    sums = torch.empty(2 * len(scales) + 1, num_images, channels, device=total.device)
    _backward_kernel[(num_images,)](
        (total, grads_y[0], grads_y[-1], total if grad_total is None else grad_total),
        grad_x,
        total if bias is None else bias,
        (mean, rstd),
        (scales[0], scales[-1]),
        sums,
        height * width,
        C=channels,
        GROUPS=mean.shape[1],
        **_tiling(channels, height * width, num_outputs=len(scales)),
        HAS_BIAS=bias is not None,
        HAS_GRAD_TOTAL=grad_total is not None,
        OUTPUTS=len(scales),
    )
    count = len(scales)
    return grad_x, tuple(sums[:count]), tuple(sums[count:-1]), sums[-1]


def _tiling(channels: int, num_positions: int, *, num_outputs: int) -> dict[str, int]:
    """Returns how many positions a program takes at a time, and its warps."""
    num_positions = triton.next_power_of_2(num_positions)
    num_warps = min(16, max(4, channels * num_positions // _PER_WARP))
    tile = 32 * num_warps * _PER_THREAD // num_outputs
    rows = min(num_positions, max(1, tile // channels))
    return {"ROWS": rows, "num_warps": num_warps}


if triton is not None:

    @triton.jit
    def _forward_kernel(
        images,
        bias,
        outputs,
        statistics,
        affines,
        num_positions,
        eps,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """One program: one image, read twice (the second time from the L2 cache)."""
        x, _, total = images
        image, channel = tl.program_id(0).to(tl.int64), tl.arange(0, C)
        base = image * num_positions * C
        added = tl.load(bias + channel) if HAS_BIAS else tl.zeros((C,), tl.float32)
        sums, squares = _form_sum(
            images, added, base, num_positions, C, ROWS, HAS_RESIDUAL
        )
        count = num_positions * (C // GROUPS)
        mean = tl.sum(tl.reshape(sums, (GROUPS, C // GROUPS)), axis=1) / count
        square = tl.sum(tl.reshape(squares, (GROUPS, C // GROUPS)), axis=1) / count
        rstd = tl.rsqrt(_relu(square - mean * mean) + eps)
        group = image * GROUPS + tl.arange(0, GROUPS)
        tl.store(statistics[0] + group, mean)
        tl.store(statistics[1] + group, rstd)
        center, slope = _spread(mean, C, GROUPS), _spread(rstd, C, GROUPS)
        if HAS_RESIDUAL:
            x = total
            added = tl.zeros((C,), tl.float32)
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, ROWS)
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            active = _relu(value + added[None, :])
            for index in tl.static_range(OUTPUTS):
                gain = tl.load(affines[2 * index] + channel) * slope
                shift = tl.load(affines[2 * index + 1] + channel) - center * gain
                y = active * gain[None, :] + shift[None, :]
                y = y.to(outputs[index].dtype.element_ty)
                tl.store(outputs[index] + offset, y, mask=inside)

    @triton.jit
    def _form_sum(
        images,
        added,
        base,
        num_positions,
        C: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
    ):
        """Stores the sum, if there is a residual; returns sums of its ReLU (C,)."""
        x, residual, total = images
        sums, squares = tl.zeros((ROWS, C), tl.float32), tl.zeros((ROWS, C), tl.float32)
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, ROWS)
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            value += added[None, :]
            if HAS_RESIDUAL:
                value += tl.load(residual + offset, mask=inside, other=0.0)
                rounded = value.to(total.dtype.element_ty)
                tl.store(total + offset, rounded, mask=inside)
                value = rounded.to(tl.float32)
            active = tl.where(inside, _relu(value), 0.0)
            sums += active
            squares += active * active
        return tl.sum(sums, axis=0), tl.sum(squares, axis=0)

    @triton.jit
    def _backward_kernel(
        images,
        grad_x,
        bias,
        statistics,
        scales,
        sums,
        num_positions,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GRAD_TOTAL: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """One program: one image, read twice (the second time from the L2 cache)."""
        image, channel = tl.program_id(0).to(tl.int64), tl.arange(0, C)
        group = image * GROUPS + tl.arange(0, GROUPS)
        base = image * num_positions * C
        added = tl.load(bias + channel) if HAS_BIAS else tl.zeros((C,), tl.float32)
        center = _spread(tl.load(statistics[0] + group), C, GROUPS)
        slope = _spread(tl.load(statistics[1] + group), C, GROUPS)
        gain, more_gain = tl.load(scales[0] + channel), tl.load(scales[1] + channel)
        shift, scale, more_shift, more_scale = _affine_sums(
            images, added, center, base, num_positions, C, ROWS, OUTPUTS
        )
        place, step = sums + image * C + channel, tl.num_programs(0) * C
        tl.store(place, scale * slope)
        tl.store(place + OUTPUTS * step, shift)
        if OUTPUTS == 2:
            tl.store(place + step, more_scale * slope)
            tl.store(place + 3 * step, more_shift)
        # The gradient is linear in what was given and in what was normalised.
        count = num_positions * (C // GROUPS)
        along = (scale * gain + more_scale * more_gain) * slope
        per_value = -slope * slope * _group_sum(along, C, GROUPS) / count
        given = shift * gain + more_shift * more_gain
        constant = -slope * _group_sum(given, C, GROUPS) / count - per_value * center
        weights = (gain * slope, more_gain * slope, per_value, constant)
        bias_sum = _store_images(
            images, grad_x, added, weights, base, num_positions, C, ROWS,
            HAS_GRAD_TOTAL, OUTPUTS,
        )  # fmt: skip
        tl.store(place + 2 * OUTPUTS * step, bias_sum)

    @triton.jit
    def _affine_sums(
        images,
        added,
        center,
        base,
        num_positions,
        C: tl.constexpr,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """Returns sums (C,) of each gradient, alone and times the centred ReLU."""
        total, grad_y, more_grad_y, _ = images
        zero = tl.zeros((ROWS, C), tl.float32)
        shift, scale, more_shift, more_scale = zero, zero, zero, zero
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, ROWS)
            value = tl.load(total + offset, mask=inside, other=0.0).to(tl.float32)
            centred = _relu(value + added[None, :]) - center[None, :]
            grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
            shift += grad
            scale += grad * centred
            if OUTPUTS == 2:
                grad = tl.load(more_grad_y + offset, mask=inside, other=0.0)
                grad = grad.to(tl.float32)
                more_shift += grad
                more_scale += grad * centred
        shift, scale = tl.sum(shift, axis=0), tl.sum(scale, axis=0)
        return shift, scale, tl.sum(more_shift, axis=0), tl.sum(more_scale, axis=0)

    @triton.jit
    def _store_images(
        images,
        grad_x,
        added,
        weights,
        base,
        num_positions,
        C: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_GRAD_TOTAL: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """Stores the gradient of the sum; returns its own sums (C,)."""
        total, grad_y, more_grad_y, grad_total = images
        gain, more_gain, per_value, constant = weights
        bias_sum = tl.zeros((ROWS, C), tl.float32)
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, ROWS)
            value = tl.load(total + offset, mask=inside, other=0.0).to(tl.float32)
            value += added[None, :]
            grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
            result = grad * gain[None, :] + constant[None, :]
            if OUTPUTS == 2:
                grad = tl.load(more_grad_y + offset, mask=inside, other=0.0)
                result += grad.to(tl.float32) * more_gain[None, :]
            result += _relu(value) * per_value[None, :]
            result = tl.where((value > 0) & inside, result, 0.0)
            if HAS_GRAD_TOTAL:
                result += tl.load(grad_total + offset, mask=inside, other=0.0)
            bias_sum += result
            tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)
        return tl.sum(bias_sum, axis=0)

    @triton.jit
    def _relu(value):
        """Returns the positive part; NaN stays, so that its example is left out."""
        return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _tile(base, start, num_positions, C: tl.constexpr, ROWS: tl.constexpr):
        """Returns where ROWS positions of an image lie, and which of them exist."""
        position = start + tl.arange(0, ROWS)
        inside = (position < num_positions)[:, None] & (tl.arange(0, C) < C)[None, :]
        return base + position[:, None] * C + tl.arange(0, C)[None, :], inside

    @triton.jit
    def _spread(values, C: tl.constexpr, GROUPS: tl.constexpr):
        """Gives every channel the value of its group: (GROUPS,) to (C,)."""
        wide = tl.broadcast_to(values[:, None], (GROUPS, C // GROUPS))
        return tl.reshape(wide, (C,))

    @triton.jit
    def _group_sum(values, C: tl.constexpr, GROUPS: tl.constexpr):
        """Gives every channel the sum over its group: (C,) to (C,)."""
        sums = tl.sum(tl.reshape(values, (GROUPS, C // GROUPS)), axis=1)
        return _spread(sums, C, GROUPS)
