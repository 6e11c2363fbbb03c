"""The mean of an image over its positions, whose gradient is never written out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.dispatch import fold, runs_on_triton
from dpsgd.kernels.tape import active_tape

__all__ = ["position_mean"]


def position_mean(x: Tensor) -> Tensor:
    """Returns the mean over height and width.

    PyTorch's own gradient of it is an image in the type of the mean, which is then
    rounded, and laid out channel by channel whatever the layout of the image.

    Args:
        x: (N, C, H, W) images.

    Returns:
        (N, C), float32 or wider.
    """
    if active_tape() is None and not runs_on_triton(x):
        return x.mean((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32))
    mean: Tensor = _PositionMean.apply(x)
    return mean


class _PositionMean(Function):
    """The gradient is one number for all positions, expanded over them."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.mean((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype, ctx.size = inputs[0].dtype, inputs[0].shape[-2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        of_one = (grad / ctx.size.numel()).to(ctx.dtype)
        return of_one[..., None, None].expand(*grad.shape, *ctx.size)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int]:
        mean: Tensor = _PositionMean.apply(fold(x, in_dims[0], info.batch_size))
        return mean.unflatten(0, (info.batch_size, -1)), 0
