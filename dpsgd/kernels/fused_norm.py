"""A sum, ReLU and group normalisation, differentiable, also under vmap(grad)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.dispatch import fold, require_unbatched, runs_on_triton
from dpsgd.kernels.relu_group_norm import (
    Affine,
    relu_group_norm_backward,
    relu_group_norm_forward,
)
from dpsgd.kernels.tape import active_tape, leaf_grad

__all__ = ["group_norm", "sum_relu_group_norm"]

_TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def sum_relu_group_norm(
    x: Tensor,
    biases: tuple[Tensor, ...],
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    *,
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Returns norms of the ReLU of a sum, and the sum.

    Args:
        x: (N, C, H, W) images.
        biases: (C,) float32 parameters that are added to every image, two at most.
        residual: (N, C, H, W) of the type of `x` that is added, or None.
        affines: One or two pairs of scale and shift, (C,) float32 parameters.
        num_groups: Groups that share mean and variance; divides C.
        eps: Added to the variance.

    Returns:
        `group_norm(relu(x + biases + residual))` for each pair, (N, C, H, W) of the
        type of `x`; and, if there is a residual, the sum. Statistics are float32 or
        wider.

    Source: Wu and He 2018 (arXiv:1803.08494); the order: De et al. 2022
    (arXiv:2204.13650), reference code.
    """
    if active_tape() is None and not runs_on_triton(x):
        return _plain(x, biases, residual, affines, num_groups, eps)
    pad = (None, None)
    first, second = (*biases, *pad)[:2]
    others = affines[1] if len(affines) == 2 else pad
    y, more_y, total, *_ = _SumReluGroupNorm.apply(
        x, residual, first, second, *affines[0], *others, num_groups, eps
    )
    outputs = (y,) if len(affines) == 1 else (y, more_y)
    return outputs, (total if residual is not None else None)


def group_norm(
    x: Tensor, num_groups: int, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Returns what PyTorch's own does, which not every version does under vmap.

    Args:
        x: (N, C, H, W) images.
        num_groups: Groups that share mean and variance; divides C.
        scale: (C,) of the type of `x`.
        shift: (C,) of the type of `x`.
        eps: Added to the variance.
    """
    if _TORCH_VERSION < (2, 14):  # torch 2.11 has no rule for other layouts
        x = x.contiguous()
    return F.group_norm(x, num_groups, scale, shift, eps)


def _plain(
    x: Tensor,
    biases: tuple[Tensor, ...],
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Does what `sum_relu_group_norm` does, with PyTorch's own operators."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    for bias in biases:
        x = x + bias.to(dtype).view(-1, 1, 1)
    if residual is not None:
        x = x + residual
    active = F.relu(x).to(wide)
    outputs = tuple(
        group_norm(active, num_groups, scale.to(wide), shift.to(wide), eps).to(x.dtype)
        for scale, shift in affines
    )
    return outputs, (x if residual is not None else None)


class _SumReluGroupNorm(Function):
    """Forward: the images of all examples in one launch."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        more_bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        more_scale: Tensor | None,
        more_shift: Tensor | None,
        num_groups: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        bias = _added(bias, more_bias)
        affines: tuple[Affine, ...] = ((scale, shift),)
        if more_scale is not None and more_shift is not None:
            affines = (*affines, (more_scale, more_shift))
        outputs, total, mean, rstd = relu_group_norm_forward(
            x, bias, residual, affines, num_groups=num_groups, eps=eps
        )
        none = x.new_empty(0)
        more = outputs[1] if len(outputs) == 2 else none
        return outputs[0], more, (none if total is None else total), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, bias, more_bias, scale, shift, more_scale, more_shift, *_ = inputs
        _, more_y, total, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.has_residual, ctx.has_more = residual is not None, more_scale is not None
        unused = [one for one in (more_y, total) if one.ndim == 1]
        ctx.mark_non_differentiable(mean, rstd, *unused)
        read = total if ctx.has_residual else x
        leaves = (bias, more_bias, scale, shift, more_scale, more_shift)
        ctx.save_for_backward(read, mean, rstd, *leaves)

    @staticmethod
    def backward(
        ctx: Any,
        grad_y: Tensor | None,
        grad_more: Tensor | None,
        grad_total: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor | None, ...]:
        read, mean, rstd, *leaves = ctx.saved_tensors
        bias = None if ctx.has_residual else _added(leaves[0], leaves[1])
        grads_y = [
            torch.zeros_like(read) if grad is None else grad
            for grad in ((grad_y, grad_more) if ctx.has_more else (grad_y,))
        ]
        scales = (leaves[2], leaves[4]) if ctx.has_more else (leaves[2],)
        grad_x, *rows = _Backward.apply(
            read, mean, rstd, bias, grad_total, len(grads_y), *grads_y, *scales
        )
        of_bias, of_scale, of_shift, *of_more = (rows[-1], *_pairs(rows[:-1]))
        per_leaf = [of_bias, of_bias, of_scale, of_shift, *(of_more or (None, None))]
        grad_residual = grad_x if ctx.has_residual else None
        grads = _leaf_grads(leaves, per_leaf)
        return grad_x, grad_residual, *grads, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        residual: Tensor | None,
        *rest: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        require_unbatched("sum_relu_group_norm", in_dims[2:])
        size = info.batch_size
        if residual is not None:
            residual = fold(residual, in_dims[1], size)
        outputs = _SumReluGroupNorm.apply(fold(x, in_dims[0], size), residual, *rest)
        return _unfold(outputs, size)


class _Backward(Function):
    """Backward: gradients of scales, shifts and bias for every image."""

    @staticmethod
    def forward(
        read: Tensor,
        mean: Tensor,
        rstd: Tensor,
        bias: Tensor | None,
        grad_total: Tensor | None,
        num_outputs: int,
        *grads_and_scales: Tensor,
    ) -> tuple[Tensor, ...]:
        grads_y = grads_and_scales[:num_outputs]
        scales = grads_and_scales[num_outputs:]
        grad_x, grad_scales, grad_shifts, grad_bias = relu_group_norm_backward(
            read, bias, grads_y, grad_total, mean, rstd, scales
        )
        return grad_x, *grad_scales, *grad_shifts, grad_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size, num_outputs = info.batch_size, inputs[5]
        first_scale = 6 + num_outputs
        require_unbatched("sum_relu_group_norm", (in_dims[3], *in_dims[first_scale:]))
        read, mean, rstd, grad_total, *grads_y = (
            None if inputs[index] is None else fold(inputs[index], in_dims[index], size)
            for index in (0, 1, 2, 4, *range(6, first_scale))
        )
        outputs = _Backward.apply(
            read, mean, rstd, inputs[3], grad_total, num_outputs, *grads_y,
            *inputs[first_scale:],
        )  # fmt: skip
        return _unfold(outputs, size)


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Returns the sum of the biases that there are."""
    return first if second is None or first is None else first + second


def _unfold(
    outputs: tuple[Tensor, ...], num_examples: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Gives outputs their axis of examples back, where they have images."""
    has_images = [one.ndim > 1 for one in outputs]
    unfolded = tuple(
        one.unflatten(0, (num_examples, -1)) if has else one
        for one, has in zip(outputs, has_images, strict=True)
    )
    return unfolded, tuple(0 if has else None for has in has_images)


def _pairs(rows: list[Tensor]) -> list[Tensor]:
    """Returns scale and shift of the first norm, then of the second."""
    count = len(rows) // 2
    return [row for index in range(count) for row in (rows[index], rows[count + index])]


def _leaf_grads(
    leaves: list[Tensor | None], per_image: list[Tensor | None]
) -> list[Tensor | None]:
    """Returns gradients of the parameters that there are."""
    return [
        None if leaf is None or rows is None else leaf_grad(leaf, rows)
        for leaf, rows in zip(leaves, per_image, strict=True)
    ]
