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

# A program takes whole groups of an image: one cache line of channels, or as many as a
# group has. The less of the images is under way at once, the more of it the second
# reading finds in the L2 cache.
_CHANNELS = 64
# It walks over them with this many elements a thread at a time, and adds up in
# registers: what does not fit there is spilled, at four times the cost.
_PER_THREAD = 32
_PER_WARP = 4096  # elements of a program for each of its warps


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
    tiling = _tiling(channels, num_groups, height * width, num_outputs=1)
    _forward_kernel[(num_images * (channels // tiling["BLOCK_C"]),)](
        (x, x if residual is None else residual, x if total is None else total),
        x if bias is None else bias,
        (outputs[0], outputs[-1]),
        (mean, rstd),
        (*affines[0], *affines[-1]),
        height * width,
        eps,
        C=channels,
        GROUPS=num_groups,
        **tiling,
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
    num_groups = mean.shape[1]
    tiling = _tiling(channels, num_groups, height * width, num_outputs=len(scales))
    _backward_kernel[(num_images * (channels // tiling["BLOCK_C"]),)](
        (total, grads_y[0], grads_y[-1], total if grad_total is None else grad_total),
        grad_x,
        total if bias is None else bias,
        (mean, rstd),
        (scales[0], scales[-1]),
        sums,
        height * width,
        C=channels,
        GROUPS=num_groups,
        **tiling,
        HAS_BIAS=bias is not None,
        HAS_GRAD_TOTAL=grad_total is not None,
        OUTPUTS=len(scales),
    )
    count = len(scales)
    return grad_x, tuple(sums[:count]), tuple(sums[count:-1]), sums[-1]


def _tiling(
    channels: int, num_groups: int, num_positions: int, *, num_outputs: int
) -> dict[str, int]:
    """Returns a program's channels, its warps, and the positions it takes at a time."""
    block = min(channels, max(_CHANNELS, channels // num_groups))
    num_positions = triton.next_power_of_2(num_positions)
    num_warps = min(16, max(4, block * num_positions // _PER_WARP))
    tile = 32 * num_warps * _PER_THREAD // num_outputs
    rows = min(num_positions, max(1, tile // block))
    return {"BLOCK_C": block, "ROWS": rows, "num_warps": num_warps}


if triton is not None:
    # What is read again stays in the L2 cache, what is not makes room.
    KEEP = tl.constexpr("evict_last")
    DROP = tl.constexpr("evict_first")

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
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """One program: some groups of an image, read twice, then from a cache."""
        x, _, total = images
        image, first = _place(C, BLOCK_C)
        channel, base = first + tl.arange(0, BLOCK_C), image * num_positions * C + first
        none = tl.zeros((BLOCK_C,), tl.float32)
        added = tl.load(bias + channel) if HAS_BIAS else none
        sums, squares = _form_sum(
            images, added, base, num_positions, C, BLOCK_C, ROWS, HAS_RESIDUAL
        )
        WIDTH: tl.constexpr = C // GROUPS
        HERE: tl.constexpr = BLOCK_C // WIDTH
        count = num_positions * WIDTH
        mean = tl.sum(tl.reshape(sums, (HERE, WIDTH)), axis=1) / count
        square = tl.sum(tl.reshape(squares, (HERE, WIDTH)), axis=1) / count
        rstd = tl.rsqrt(_relu(square - mean * mean) + eps)
        group = image * GROUPS + first // WIDTH + tl.arange(0, HERE)
        tl.store(statistics[0] + group, mean)
        tl.store(statistics[1] + group, rstd)
        center, slope = _spread(mean, HERE, WIDTH), _spread(rstd, HERE, WIDTH)
        if HAS_RESIDUAL:
            x = total
            added = none
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, BLOCK_C, ROWS)
            value = tl.load(
                x + offset, mask=inside, other=0.0, eviction_policy=DROP
            ).to(tl.float32)
            active = _relu(value + added[None, :])
            for index in tl.static_range(OUTPUTS):
                gain = tl.load(affines[2 * index] + channel) * slope
                shift = tl.load(affines[2 * index + 1] + channel) - center * gain
                y = active * gain[None, :] + shift[None, :]
                y = y.to(outputs[index].dtype.element_ty)
                tl.store(outputs[index] + offset, y, mask=inside, eviction_policy=DROP)

    @triton.jit
    def _form_sum(
        images,
        added,
        base,
        num_positions,
        C: tl.constexpr,
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
    ):
        """Stores the sum with a residual; returns (BLOCK_C,) sums of its ReLU."""
        x, residual, total = images
        READ: tl.constexpr = DROP if HAS_RESIDUAL else KEEP  # once, or once more
        zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
        sums, squares = zero, zero
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, BLOCK_C, ROWS)
            value = tl.load(x + offset, mask=inside, other=0.0, eviction_policy=READ)
            value = value.to(tl.float32) + added[None, :]
            if HAS_RESIDUAL:
                value += tl.load(
                    residual + offset, mask=inside, other=0.0, eviction_policy=DROP
                )
                rounded = value.to(total.dtype.element_ty)
                tl.store(total + offset, rounded, mask=inside, eviction_policy=KEEP)
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
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GRAD_TOTAL: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """One program: some groups of an image, read twice, then from a cache."""
        image, first = _place(C, BLOCK_C)
        channel, base = first + tl.arange(0, BLOCK_C), image * num_positions * C + first
        WIDTH: tl.constexpr = C // GROUPS
        HERE: tl.constexpr = BLOCK_C // WIDTH
        group = image * GROUPS + first // WIDTH + tl.arange(0, HERE)
        none = tl.zeros((BLOCK_C,), tl.float32)
        added = tl.load(bias + channel) if HAS_BIAS else none
        center = _spread(tl.load(statistics[0] + group), HERE, WIDTH)
        slope = _spread(tl.load(statistics[1] + group), HERE, WIDTH)
        gain, more_gain = tl.load(scales[0] + channel), tl.load(scales[1] + channel)
        shift, scale, more_shift, more_scale = _affine_sums(
            images, added, center, base, num_positions, C, BLOCK_C, ROWS, OUTPUTS
        )
        place, step = sums + image * C + channel, tl.num_programs(0) * BLOCK_C
        tl.store(place, scale * slope)
        tl.store(place + OUTPUTS * step, shift)
        if OUTPUTS == 2:
            tl.store(place + step, more_scale * slope)
            tl.store(place + 3 * step, more_shift)
        # The gradient is linear in what was given and in what was normalised.
        count = num_positions * WIDTH
        along = (scale * gain + more_scale * more_gain) * slope
        per_value = -slope * slope * _group_sum(along, HERE, WIDTH) / count
        given = shift * gain + more_shift * more_gain
        given = _group_sum(given, HERE, WIDTH)
        constant = -slope * given / count - per_value * center
        weights = (gain * slope, more_gain * slope, per_value, constant)
        bias_sum = _store_images(
            images, grad_x, added, weights, base, num_positions, C, BLOCK_C, ROWS,
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
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """Returns (BLOCK_C,) sums of gradients, alone and times the centred ReLU."""
        total, grad_y, more_grad_y, _ = images
        zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
        shift, scale, more_shift, more_scale = zero, zero, zero, zero
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, BLOCK_C, ROWS)
            value = tl.load(
                total + offset, mask=inside, other=0.0, eviction_policy=KEEP
            ).to(tl.float32)
            centred = _relu(value + added[None, :]) - center[None, :]
            grad = tl.load(
                grad_y + offset, mask=inside, other=0.0, eviction_policy=KEEP
            ).to(tl.float32)
            shift += grad
            scale += grad * centred
            if OUTPUTS == 2:
                grad = tl.load(
                    more_grad_y + offset, mask=inside, other=0.0, eviction_policy=KEEP
                )
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
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
        HAS_GRAD_TOTAL: tl.constexpr,
        OUTPUTS: tl.constexpr,
    ):
        """Stores the gradient of the sum; returns its own sums (BLOCK_C,)."""
        total, grad_y, more_grad_y, grad_total = images
        gain, more_gain, per_value, constant = weights
        bias_sum = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for start in range(0, num_positions, ROWS):
            offset, inside = _tile(base, start, num_positions, C, BLOCK_C, ROWS)
            value = tl.load(
                total + offset, mask=inside, other=0.0, eviction_policy=DROP
            ).to(tl.float32)
            value += added[None, :]
            grad = tl.load(
                grad_y + offset, mask=inside, other=0.0, eviction_policy=DROP
            ).to(tl.float32)
            result = grad * gain[None, :] + constant[None, :]
            if OUTPUTS == 2:
                grad = tl.load(
                    more_grad_y + offset, mask=inside, other=0.0, eviction_policy=DROP
                )
                result += grad.to(tl.float32) * more_gain[None, :]
            result += _relu(value) * per_value[None, :]
            result = tl.where((value > 0) & inside, result, 0.0)
            if HAS_GRAD_TOTAL:
                result += tl.load(
                    grad_total + offset, mask=inside, other=0.0, eviction_policy=DROP
                )
            bias_sum += result
            tl.store(
                grad_x + offset,
                result.to(grad_x.dtype.element_ty),
                mask=inside,
                eviction_policy=DROP,
            )
        return tl.sum(bias_sum, axis=0)

    @triton.jit
    def _relu(value):
        """Returns the positive part; NaN stays, so that its example is left out."""
        return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _tile(
        base,
        start,
        num_positions,
        C: tl.constexpr,
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Returns where ROWS positions of an image lie, and which of them exist."""
        position, channel = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
        inside = (position < num_positions)[:, None] & (channel < BLOCK_C)[None, :]
        return base + position[:, None] * C + channel[None, :], inside

    @triton.jit
    def _place(C: tl.constexpr, BLOCK_C: tl.constexpr):
        """Returns a program's image, and the first of its channels."""
        program = tl.program_id(0)
        image = program // (C // BLOCK_C)
        return image.to(tl.int64), program % (C // BLOCK_C) * BLOCK_C

    @triton.jit
    def _spread(values, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
        """Gives every channel the value of its group: (G,) to (G * WIDTH,)."""
        wide = tl.broadcast_to(values[:, None], (GROUPS, WIDTH))
        return tl.reshape(wide, (GROUPS * WIDTH,))

    @triton.jit
    def _group_sum(values, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
        """Gives every channel the sum over its group: (G * WIDTH,) to itself."""
        sums = tl.sum(tl.reshape(values, (GROUPS, WIDTH)), axis=1)
        return _spread(sums, GROUPS, WIDTH)
