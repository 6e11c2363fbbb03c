"""ReLU, then group normalisation, of channels-last images: one kernel each way.

The backward pass gives scale and shift gradients for every image, so that per-sample
gradients cost nothing extra.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.dispatch import require_unbatched, runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "relu_group_norm",
    "relu_group_norm_backward_reference",
    "relu_group_norm_backward_triton",
    "relu_group_norm_reference",
    "relu_group_norm_triton",
]

_TILE = 32768  # elements a program holds at a time: measured on an H100
_NUM_WARPS = 8


def relu_group_norm(
    x: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int, eps: float
) -> Tensor:
    """Returns `group_norm(relu(x))`, differentiably, also under vmap(grad).

    Args:
        x: (N, C, H, W) images.
        scale: (C,) float32.
        shift: (C,) float32.
        num_groups: Groups that share mean and variance; divides C.
        eps: Added to the variance.

    Returns:
        (N, C, H, W) of the type of `x`; statistics are float32 or wider.

    Source: Wu and He 2018 (arXiv:1803.08494); the order: De et al. 2022
    (arXiv:2204.13650), reference code.
    """
    channels = x.shape[1]
    has_kernel = channels & (channels - 1) == 0 and x.dtype != torch.float64
    if has_kernel and runs_on_triton(x):
        y: Tensor = _ReluGroupNorm.apply(x, scale, shift, num_groups, eps)[0]
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    active = F.relu(x).to(wide)
    y = F.group_norm(active, num_groups, scale.to(wide), shift.to(wide), eps)
    return y.to(x.dtype)


class _ReluGroupNorm(Function):
    """Forward: the images of all examples in one launch."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, shift: Tensor, num_groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        on_triton = runs_on_triton(x)
        run = relu_group_norm_triton if on_triton else relu_group_norm_reference
        return run(x, scale, shift, num_groups=num_groups, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, *_ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, mean, rstd, scale)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale = ctx.saved_tensors
        grad_x, grad_scale, grad_shift = _Backward.apply(x, grad_y, mean, rstd, scale)
        return grad_x, grad_scale.sum(0), grad_shift.sum(0), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        require_unbatched("relu_group_norm", in_dims[1:])
        x = x.movedim(in_dims[0], 0)
        outputs = _ReluGroupNorm.apply(x.flatten(0, 1), *rest)
        return tuple(one.unflatten(0, x.shape[:2]) for one in outputs), (0, 0, 0)


class _Backward(Function):
    """Backward: gradients of scale and shift for every image."""

    @staticmethod
    def forward(
        x: Tensor, grad_y: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if runs_on_triton(x):
            return relu_group_norm_backward_triton(x, grad_y, mean, rstd, scale)
        return relu_group_norm_backward_reference(x, grad_y, mean, rstd, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        require_unbatched("relu_group_norm", in_dims[4:])
        per_image = [
            tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors[:4], in_dims[:4], strict=True)
        ]
        shape = per_image[0].shape[:2]
        flat = [tensor.flatten(0, 1) for tensor in per_image]
        outputs = _Backward.apply(*flat, tensors[4])
        return tuple(one.unflatten(0, shape) for one in outputs), (0, 0, 0)


def relu_group_norm_reference(
    x: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `group_norm(relu(x))` with each image's statistics, in PyTorch.

    Args:
        x: (N, C, H, W) images.
        scale: (C,) float32.
        shift: (C,) float32.
        num_groups: Groups that share mean and variance; divides C.
        eps: Added to the variance.

    Returns:
        (N, C, H, W) of the type of `x`; (N, groups) mean; (N, groups) reciprocal
        standard deviation, both float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    active = F.relu(x).to(wide)
    groups = active.unflatten(1, (num_groups, -1)).flatten(2)  # (N, G, C / G * P)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    y = F.group_norm(active, num_groups, scale.to(wide), shift.to(wide), eps)
    return y.to(x.dtype), mean, torch.rsqrt(variance + eps)


def relu_group_norm_backward_reference(
    x: Tensor, grad_y: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `relu_group_norm_reference`, in PyTorch.

    Args:
        x: (N, C, H, W) images.
        grad_y: (N, C, H, W) gradients of the output.
        mean: (N, groups) from the forward pass.
        rstd: (N, groups) from the forward pass.
        scale: (C,) float32.

    Returns:
        (N, C, H, W) gradient of `x`, in its type; (N, C) gradients of scale and of
        shift for each image, float32 or wider.
    """
    wide = mean.dtype
    num_groups = mean.shape[1]
    per_group = (num_groups, x.shape[1] // num_groups)
    active = F.relu(x).to(wide).unflatten(1, per_group).flatten(3)  # (N, G, C / G, P)
    grad = grad_y.to(wide).unflatten(1, per_group).flatten(3)
    normalized = (active - mean[:, :, None, None]) * rstd[:, :, None, None]
    grad_scale, grad_shift = (grad * normalized).sum(3), grad.sum(3)
    scaled = grad * scale.to(wide).view(*per_group, 1)
    centred = scaled - scaled.mean((2, 3), keepdim=True)
    along = (scaled * normalized).mean((2, 3), keepdim=True)
    grad_x = (centred - normalized * along) * rstd[:, :, None, None]
    grad_x = grad_x.view_as(x) * (x > 0)
    return grad_x.to(x.dtype), grad_scale.flatten(1), grad_shift.flatten(1)


def relu_group_norm_triton(
    x: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `relu_group_norm_reference` does, in one Triton launch."""
    x = x.contiguous(memory_format=torch.channels_last)
    num_images, channels, height, width = x.shape
    y = torch.empty_like(x)
    mean = torch.empty(num_images, num_groups, device=x.device)
    rstd = torch.empty_like(mean)
    _forward_kernel[(num_images,)](
        x,
        y,
        mean,
        rstd,
        scale,
        shift,
        height * width,
        eps,
        C=channels,
        GROUPS=num_groups,
        ROWS=_rows(channels, height * width),
        num_warps=_NUM_WARPS,
    )
    return y, mean, rstd


def relu_group_norm_backward_triton(
    x: Tensor, grad_y: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `relu_group_norm_backward_reference` does, in one Triton launch."""
    x = x.contiguous(memory_format=torch.channels_last)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    num_images, channels, height, width = x.shape
    grad_x = torch.empty_like(x)
    grad_scale = torch.empty(num_images, channels, device=x.device)
    grad_shift = torch.empty_like(grad_scale)
    _backward_kernel[(num_images,)](
        x,
        grad_y,
        grad_x,
        mean,
        rstd,
        scale,
        grad_scale,
        grad_shift,
        height * width,
        C=channels,
        GROUPS=mean.shape[1],
        ROWS=_rows(channels, height * width),
        num_warps=_NUM_WARPS,
    )
    return grad_x, grad_scale, grad_shift


def _rows(channels: int, num_positions: int) -> int:
    """Returns how many positions a program holds at a time, a power of two."""
    return min(triton.next_power_of_2(num_positions), max(1, _TILE // channels))


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x,
        y,
        mean,
        rstd,
        scale,
        shift,
        num_positions,
        eps,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One program: one image, read twice (the second time from the L2 cache)."""
        image = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, C)
        group = tl.arange(0, GROUPS)
        base = image * num_positions * C
        total = tl.zeros((C,), tl.float32)
        squares = tl.zeros((C,), tl.float32)
        for start in range(0, num_positions, ROWS):
            position = start + tl.arange(0, ROWS)
            offset = base + position[:, None] * C + channel[None, :]
            inside = (position < num_positions)[:, None]
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            value = tl.maximum(value, 0.0)
            total += tl.sum(value, axis=0)
            squares += tl.sum(value * value, axis=0)
        count = num_positions * (C // GROUPS)
        group_mean = tl.sum(tl.reshape(total, (GROUPS, C // GROUPS)), axis=1) / count
        group_square = tl.sum(tl.reshape(squares, (GROUPS, C // GROUPS)), axis=1)
        variance = tl.maximum(group_square / count - group_mean * group_mean, 0.0)
        group_rstd = tl.rsqrt(variance + eps)
        tl.store(mean + image * GROUPS + group, group_mean)
        tl.store(rstd + image * GROUPS + group, group_rstd)
        slope = tl.load(scale + channel) * _spread(group_rstd, C, GROUPS)
        offset_y = tl.load(shift + channel) - _spread(group_mean, C, GROUPS) * slope
        for start in range(0, num_positions, ROWS):
            position = start + tl.arange(0, ROWS)
            offset = base + position[:, None] * C + channel[None, :]
            inside = (position < num_positions)[:, None]
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            value = tl.maximum(value, 0.0) * slope[None, :] + offset_y[None, :]
            tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        x,
        grad_y,
        grad_x,
        mean,
        rstd,
        scale,
        grad_scale,
        grad_shift,
        num_positions,
        C: tl.constexpr,
        GROUPS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One program: one image, read twice (the second time from the L2 cache)."""
        image = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, C)
        group = tl.arange(0, GROUPS)
        base = image * num_positions * C
        center = _spread(tl.load(mean + image * GROUPS + group), C, GROUPS)
        slope = _spread(tl.load(rstd + image * GROUPS + group), C, GROUPS)
        gain = tl.load(scale + channel)
        sum_grad = tl.zeros((C,), tl.float32)
        sum_along = tl.zeros((C,), tl.float32)
        for start in range(0, num_positions, ROWS):
            position = start + tl.arange(0, ROWS)
            offset = base + position[:, None] * C + channel[None, :]
            inside = (position < num_positions)[:, None]
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
            normalized = (tl.maximum(value, 0.0) - center[None, :]) * slope[None, :]
            sum_grad += tl.sum(grad, axis=0)
            sum_along += tl.sum(grad * normalized, axis=0)
        tl.store(grad_shift + image * C + channel, sum_grad)
        tl.store(grad_scale + image * C + channel, sum_along)
        count = num_positions * (C // GROUPS)
        mean_grad = _group_sum(sum_grad * gain, C, GROUPS) / count
        mean_along = _group_sum(sum_along * gain, C, GROUPS) / count
        for start in range(0, num_positions, ROWS):
            position = start + tl.arange(0, ROWS)
            offset = base + position[:, None] * C + channel[None, :]
            inside = (position < num_positions)[:, None]
            value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
            normalized = (tl.maximum(value, 0.0) - center[None, :]) * slope[None, :]
            result = grad * gain[None, :] - mean_grad[None, :]
            result = (result - normalized * mean_along[None, :]) * slope[None, :]
            result = tl.where(value > 0, result, 0.0)
            tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)

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
