"""The end of a residual block: one pass over the images forward, and one backward.

A branch with its bias is scaled and added to the shortcut, and the next block reads the
activation of the sum. The backward pass writes the gradients of branch and shortcut
anyway, and adds up over the positions of each image what the per-sample gradients of
biases and scale are made of, so that these cost nothing extra.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.activations import Activation, activation, activation_backward
from dpsgd.kernels.dispatch import fold, require_unbatched, runs_on_triton
from dpsgd.kernels.residual_activation_triton import (
    residual_activation_backward_triton,
    residual_activation_triton,
)
from dpsgd.kernels.tape import active_tape, leaf_grad

__all__ = [
    "residual_activation",
    "residual_activation_backward_reference",
    "residual_activation_reference",
]


def residual_activation(
    shortcut: Tensor,
    branch: Tensor,
    *,
    shortcut_bias: Tensor | None,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor]:
    """Returns the sum that a block ends with, and its activation.

    Differentiable, also under vmap(grad).

    Args:
        shortcut: (N, C, H, W) images.
        branch: (N, C, H, W) images of the same type.
        shortcut_bias: (C,) float32 parameter that is added to every shortcut, or None.
        bias: (C,) float32 parameter that is added to every branch.
        scale: (1 or N, 1 or C) factors of the branch and its bias, float32 or wider.
        kind: Of the activation.

    Returns:
        `shortcut + shortcut_bias + scale * (branch + bias)` and the activation of it,
        both (N, C, H, W) of the type of `branch`.
    """
    if active_tape() is None and not _has_kernel(branch):
        dtype = branch.dtype
        if shortcut_bias is not None:
            shortcut = shortcut + shortcut_bias.to(dtype).view(-1, 1, 1)
        branch = branch + bias.to(dtype).view(-1, 1, 1)
        total = torch.addcmul(shortcut, branch, scale.to(dtype)[:, :, None, None])
        return total, activation(total, kind)
    scale = scale.expand(len(branch), -1)  # one row an image, which vmap can fold
    total, active = _ResidualActivation.apply(
        shortcut, branch, shortcut_bias, bias, scale, kind
    )
    return total, active


def _has_kernel(x: Tensor) -> bool:
    """Returns whether the kernels take such images."""
    return x.dtype != torch.float64 and runs_on_triton(x)


class _ResidualActivation(Function):
    """Forward: the images of all examples in one launch."""

    @staticmethod
    def forward(
        shortcut: Tensor,
        branch: Tensor,
        shortcut_bias: Tensor | None,
        bias: Tensor,
        scale: Tensor,
        kind: Activation,
    ) -> tuple[Tensor, Tensor]:
        run = residual_activation_reference
        run = residual_activation_triton if _has_kernel(branch) else run
        return run(
            shortcut,
            branch,
            shortcut_bias=shortcut_bias,
            bias=bias,
            scale=scale,
            kind=kind,
        )

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        _, branch, shortcut_bias, bias, scale, ctx.kind = inputs
        ctx.set_materialize_grads(False)
        # Where ReLU is zero its output tells, which the next layer keeps anyway.
        kept = output[1] if ctx.kind == "relu" else output[0]
        ctx.save_for_backward(kept, branch, shortcut_bias, bias, scale)

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_active: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, branch, shortcut_bias, bias, scale = ctx.saved_tensors
        if grad_total is None and grad_active is None:
            return (None,) * 6
        grad_shortcut, grad_branch, sums, products = _Backward.apply(
            grad_total, grad_active, kept, branch, bias, scale, ctx.kind
        )
        of_shortcut_bias = None
        if shortcut_bias is not None:
            of_shortcut_bias = leaf_grad(shortcut_bias, sums)
        of_bias = leaf_grad(bias, sums * scale)
        of_scale = products
        if scale.shape[1] != products.shape[1]:
            of_scale = products.sum(1, keepdim=True)
        of_scale = of_scale.to(scale.dtype)
        return grad_shortcut, grad_branch, of_shortcut_bias, of_bias, of_scale, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        require_unbatched("residual_activation", in_dims[2:4])
        size = info.batch_size
        shortcut, branch, scale = (
            fold(inputs[index], in_dims[index], size) for index in (0, 1, 4)
        )
        outputs = _ResidualActivation.apply(
            shortcut, branch, *inputs[2:4], scale, inputs[5]
        )
        return tuple(one.unflatten(0, (size, -1)) for one in outputs), (0, 0)


class _Backward(Function):
    """Backward: gradients of the images, and sums over the positions of each."""

    @staticmethod
    def forward(
        grad_total: Tensor | None,
        grad_active: Tensor | None,
        kept: Tensor,
        branch: Tensor,
        bias: Tensor,
        scale: Tensor,
        kind: Activation,
    ) -> tuple[Tensor, ...]:
        run = residual_activation_backward_reference
        run = residual_activation_backward_triton if _has_kernel(branch) else run
        grads = (grad_total, grad_active)
        return run(grads, kept, branch, bias=bias, scale=scale, kind=kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        require_unbatched("residual_activation", in_dims[4:5])
        size = info.batch_size
        grad_total, grad_active, kept, branch, scale = (
            None if inputs[index] is None else fold(inputs[index], in_dims[index], size)
            for index in (0, 1, 2, 3, 5)
        )
        outputs = _Backward.apply(
            grad_total, grad_active, kept, branch, inputs[4], scale, inputs[6]
        )
        return tuple(one.unflatten(0, (size, -1)) for one in outputs), (0, 0, 0, 0)


def residual_activation_reference(
    shortcut: Tensor,
    branch: Tensor,
    *,
    shortcut_bias: Tensor | None,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor]:
    """Does what `residual_activation` does, in PyTorch."""
    wide = torch.promote_types(branch.dtype, torch.float32)
    value = branch.to(wide) + bias.to(wide).view(-1, 1, 1)
    total = torch.addcmul(shortcut.to(wide), value, scale.to(wide)[:, :, None, None])
    if shortcut_bias is not None:
        total += shortcut_bias.to(wide).view(-1, 1, 1)
    return total.to(branch.dtype), activation(total, kind).to(branch.dtype)


def residual_activation_backward_reference(
    grads: tuple[Tensor | None, Tensor | None],
    kept: Tensor,
    branch: Tensor,
    *,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of the images, and sums over the positions of each.

    Args:
        grads: (N, C, H, W) of the sum and of its activation; one of them may be None.
        kept: The output of ReLU, but the sum that GELU was taken of.
        branch: (N, C, H, W).
        bias: (C,) of the branch.
        scale: (1 or N, 1 or C).
        kind: Of the activation.

    Returns:
        Gradients of shortcut and branch, (N, C, H, W) in the type of `branch`; then,
        (N, C) float32 or wider, sums of the gradient of the shortcut, alone and times
        the branch with its bias.
    """
    wide = torch.promote_types(branch.dtype, torch.float32)
    grad_total, grad_active = grads
    parts = [] if grad_total is None else [grad_total.to(wide)]
    if grad_active is not None:
        parts.append(activation_backward(grad_active.to(wide), kept.to(wide), kind))
    grad = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    grad_branch = grad * scale.to(wide)[:, :, None, None]
    sums = grad.sum((2, 3))
    products = (grad * branch.to(wide)).sum((2, 3)) + bias.to(wide) * sums
    return grad.to(branch.dtype), grad_branch.to(branch.dtype), sums, products
