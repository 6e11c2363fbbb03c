"""Per-sample weight gradient of a convolution: stored, measured, or added up.

vmap lowers it to a grouped convolution, which takes several times as long as cuDNN's
ordinary weight gradient. The kernel beside this file forms each example's gradient as
one matrix product of its output gradients and its shifted inputs over all positions of
all its views; it is stored, or only measured, or added up over the examples.
"""

import torch
from torch import Tensor

from dpsgd.kernels.conv_weight_grad_triton import (
    conv_weight_grad_moments_triton,
    conv_weight_grad_sum_triton,
    conv_weight_grad_triton,
)
from dpsgd.kernels.dispatch import runs_on_triton
from dpsgd.kernels.geometry import ConvGeometry

__all__ = [
    "conv_weight_grad",
    "conv_weight_grad_moments",
    "conv_weight_grad_moments_reference",
    "conv_weight_grad_moments_triton",
    "conv_weight_grad_reference",
    "conv_weight_grad_sum",
    "conv_weight_grad_sum_reference",
    "conv_weight_grad_sum_triton",
    "conv_weight_grad_triton",
]


def conv_weight_grad(
    x: Tensor,
    grad_y: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns each example's gradient with respect to the weights.

    Args:
        x: (M, K, I, H, W) inputs of M examples with K views.
        grad_y: (M, K, O, HO, WO) gradients of the outputs, of the type of `x`.
        geometry: Of the convolution.
        dtype: Type of the result, to which float32 sums are rounded; None takes
            float32, or wider if `x` is.

    Returns:
        (M, O, KH, KW, I / groups), contiguous, summed over views.
    """
    if _has_kernel(x):
        return conv_weight_grad_triton(x, grad_y, geometry, dtype=dtype)
    return conv_weight_grad_reference(x, grad_y, geometry, dtype=dtype)


def conv_weight_grad_moments(
    x: Tensor, grad_y: Tensor, direction: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Returns sums over each output channel's weight gradient g, which is not stored.

    Args:
        x: As for `conv_weight_grad`.
        grad_y: As for `conv_weight_grad`.
        direction: (O, KH, KW, I / groups) float32 weights u.
        geometry: Of the convolution.

    Returns:
        (3, M, O): the sums of g * g, of g, and of g * u; float32 or wider.
    """
    if _has_kernel(x):
        return conv_weight_grad_moments_triton(x, grad_y, direction, geometry)
    return conv_weight_grad_moments_reference(x, grad_y, direction, geometry)


def conv_weight_grad_sum(
    x: Tensor, grad_y: Tensor, factors: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Returns the sum of all examples' weight gradients, times a factor each.

    Guarantees:
        Each example's gradient is formed in float32 before it is multiplied, so that
        what is added is the factor times the gradient whose norm was taken. An
        example whose factor is 0 is left out: inf and NaN in it cannot reach the sum.

    Args:
        x: As for `conv_weight_grad`.
        grad_y: As for `conv_weight_grad`.
        factors: (M,) float32, >= 0 and finite.
        geometry: Of the convolution.

    Returns:
        (O, KH, KW, I / groups), float32 or wider.
    """
    if _has_kernel(x):
        return conv_weight_grad_sum_triton(x, grad_y, factors, geometry)
    return conv_weight_grad_sum_reference(x, grad_y, factors, geometry)


def _has_kernel(x: Tensor) -> bool:
    """Returns whether the kernel takes such images."""
    return x.dtype != torch.float64 and runs_on_triton(x)


def conv_weight_grad_reference(
    x: Tensor,
    grad_y: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Does what `conv_weight_grad` does, in PyTorch, one example after the other.

    That is several times faster on a CPU than one product of unfolded inputs.
    """
    side, stride, padding, groups = geometry
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (grad_y.shape[2], side, side, x.shape[2] // groups)
    grads = x.new_empty(len(x), *shape, dtype=dtype or wide)
    # Only its shape and layout are read. torch.nn.grad.conv2d_weight makes one without
    # a layout, of which each example would take a copy.
    like_weight = x.new_empty(shape, dtype=wide).permute(0, 3, 1, 2)
    for index, (images, grad_images) in enumerate(zip(x, grad_y, strict=True)):
        weight_grad = torch.ops.aten.convolution_backward(
            grad_images.to(wide),
            images.to(wide),
            like_weight,
            None,
            [stride, stride],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            groups,
            [False, True, False],
        )[1]
        grads[index] = weight_grad.permute(0, 2, 3, 1)
    return grads


def conv_weight_grad_moments_reference(
    x: Tensor, grad_y: Tensor, direction: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Does what `conv_weight_grad_moments` does, in PyTorch."""
    grads = conv_weight_grad_reference(x, grad_y, geometry)  # (M, O, KH, KW, I)
    parts = [grads.square(), grads, grads * direction]
    return torch.stack([part.flatten(2).sum(2) for part in parts])


def conv_weight_grad_sum_reference(
    x: Tensor, grad_y: Tensor, factors: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Does what `conv_weight_grad_sum` does, in PyTorch."""
    kept = factors > 0
    grads = conv_weight_grad_reference(x[kept], grad_y[kept], geometry)
    return torch.einsum("m...,m->...", grads, factors[kept].to(grads.dtype))
