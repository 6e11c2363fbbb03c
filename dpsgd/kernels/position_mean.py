"""The mean of an image over its positions, whose gradient is never written out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.dispatch import fold, require_unbatched, runs_on_triton
from dpsgd.kernels.tape import active_tape, leaf_grad

__all__ = ["position_mean"]


def position_mean(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the mean over height and width.

    PyTorch's own gradient of it is an image in the type of the mean, which is then
    rounded, and laid out channel by channel whatever the layout of the image.

    Args:
        x: (N, C, H, W) images.
        bias: (C,) parameter that is added to every image, or None: to the mean, which
            is the same.

    Returns:
        (N, C), float32 or wider.
    """
    if active_tape() is None and not runs_on_triton(x):
        return _mean(x, bias)
    mean: Tensor = _PositionMean.apply(x, bias)
    return mean


def _mean(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the mean of images and bias."""
    mean = x.mean((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32))
    return mean if bias is None else mean + bias


class _PositionMean(Function):
    """The gradient is one number for all positions, expanded over them."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None) -> Tensor:
        return _mean(x, bias)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, bias = inputs
        ctx.dtype, ctx.size = x.dtype, x.shape[-2:]
        ctx.save_for_backward(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bias,) = ctx.saved_tensors
        of_one = (grad / ctx.size.numel()).to(ctx.dtype)
        of_bias = None if bias is None else leaf_grad(bias, grad)
        return of_one[..., None, None].expand(*grad.shape, *ctx.size), of_bias

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        require_unbatched("position_mean", in_dims[1:])
        mean: Tensor = _PositionMean.apply(fold(x, in_dims[0], info.batch_size), bias)
        return mean.unflatten(0, (info.batch_size, -1)), 0
