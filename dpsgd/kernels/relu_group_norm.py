"""ReLU, then group normalisation, of a sum of images: one launch each way.

The sum of a convolution's output, its bias and a residual is formed where it is first
read, and its gradient where it is last written, so that neither takes a pass of its
own. The backward pass gives gradients of scale, shift and bias for every image, so that
per-sample gradients cost nothing extra. Two norms of one sum share their statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton
from dpsgd.kernels.relu_group_norm_cpu import (
    relu_group_norm_backward_cpu,
    relu_group_norm_cpu,
)
from dpsgd.kernels.relu_group_norm_triton import (
    Affine,
    relu_group_norm_backward_triton,
    relu_group_norm_triton,
)

__all__ = [
    "Affine",
    "relu_group_norm_backward",
    "relu_group_norm_backward_cpu",
    "relu_group_norm_backward_reference",
    "relu_group_norm_backward_triton",
    "relu_group_norm_cpu",
    "relu_group_norm_forward",
    "relu_group_norm_reference",
    "relu_group_norm_triton",
]


def relu_group_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    *,
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor, Tensor]:
    """Returns `group_norm(relu(x + bias + residual))` with each image's statistics.

    Args:
        x: (N, C, H, W) images.
        bias: (C,) float32, or None.
        residual: (N, C, H, W) of the type of `x`, or None.
        affines: One or two pairs of scale and shift, (C,) float32 each.
        num_groups: Groups that share mean and variance; divides C.
        eps: Added to the variance.

    Returns:
        (N, C, H, W) of the type of `x` for each pair; the sum, rounded to that type,
        if there is a residual, else None; (N, groups) mean; (N, groups) reciprocal
        standard deviation, both float32 or wider.
    """
    run = relu_group_norm_cpu if x.is_cpu else relu_group_norm_reference
    run = relu_group_norm_triton if _has_kernel(x) else run
    return run(x, bias, residual, affines, num_groups=num_groups, eps=eps)


def relu_group_norm_backward(
    total: Tensor,
    bias: Tensor | None,
    grads_y: tuple[Tensor, ...],
    grad_total: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scales: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Returns the gradients of `relu_group_norm_forward`.

    Args:
        total: (N, C, H, W) what was normalised, without `bias`.
        bias: (C,) float32 added to it, or None.
        grads_y: (N, C, H, W) gradient of each output.
        grad_total: (N, C, H, W) gradient of the sum from elsewhere, or None.
        mean: (N, groups) from the forward pass.
        rstd: (N, groups) from the forward pass.
        scales: (C,) float32 for each output.

    Returns:
        (N, C, H, W) gradient of the sum, in its type; then, float32 or wider and for
        every image, (N, C) gradients of each scale, of each shift, and of the bias.
    """
    run = relu_group_norm_backward_reference
    run = relu_group_norm_backward_cpu if total.is_cpu else run
    run = relu_group_norm_backward_triton if _has_kernel(total) else run
    return run(total, bias, grads_y, grad_total, mean, rstd, scales)


def _has_kernel(x: Tensor) -> bool:
    """Returns whether the kernels take such images."""
    channels = x.shape[1]
    is_power_of_two = channels & (channels - 1) == 0
    return is_power_of_two and x.dtype != torch.float64 and runs_on_triton(x)


def relu_group_norm_reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    *,
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor, Tensor]:
    """Does what `relu_group_norm_forward` does, in PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) if bias is None else x.to(wide) + bias.to(wide).view(-1, 1, 1)
    total = None
    if residual is not None:
        total = (value + residual.to(wide)).to(x.dtype)
        value = total.to(wide)
    active = F.relu(value)
    groups = active.unflatten(1, (num_groups, -1)).flatten(2)  # (N, G, C / G * P)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    rstd = torch.rsqrt(variance + eps)
    # Not F.group_norm, whose sums over channels-last images lose digits on the CPU.
    normalized = (groups - mean[:, :, None]) * rstd[:, :, None]
    normalized = normalized.view(x.shape)
    outputs = tuple(
        normalized * scale.to(wide).view(-1, 1, 1) + shift.to(wide).view(-1, 1, 1)
        for scale, shift in affines
    )
    return tuple(y.to(x.dtype) for y in outputs), total, mean, rstd


def relu_group_norm_backward_reference(
    total: Tensor,
    bias: Tensor | None,
    grads_y: tuple[Tensor, ...],
    grad_total: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scales: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Does what `relu_group_norm_backward` does, in PyTorch."""
    wide = mean.dtype
    num_groups, channels = mean.shape[1], total.shape[1]
    per_group = (num_groups, channels // num_groups)
    value = total.to(wide)
    if bias is not None:
        value = value + bias.to(wide).view(-1, 1, 1)
    active = F.relu(value).unflatten(1, per_group).flatten(3)  # (N, G, C / G, P)
    normalized = (active - mean[:, :, None, None]) * rstd[:, :, None, None]
    grads = [grad.to(wide).unflatten(1, per_group).flatten(3) for grad in grads_y]
    grad_scales = tuple((grad * normalized).sum(3).flatten(1) for grad in grads)
    grad_shifts = tuple(grad.sum(3).flatten(1) for grad in grads)
    scaled = sum(
        grad * scale.to(wide).view(*per_group, 1)
        for grad, scale in zip(grads, scales, strict=True)
    )
    centred = scaled - scaled.mean((2, 3), keepdim=True)
    along = (scaled * normalized).mean((2, 3), keepdim=True)
    grad_x = (centred - normalized * along) * rstd[:, :, None, None]
    grad_x = grad_x.view_as(value) * (value > 0)
    if grad_total is not None:
        grad_x = grad_x + grad_total.to(wide)
    return grad_x.to(total.dtype), grad_scales, grad_shifts, grad_x.sum((2, 3))
