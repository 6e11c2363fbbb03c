"""An activation of images and their bias: one pass forward, and one backward.

The sum is formed where it is read. The backward pass writes the gradient of the images
anyway, and adds it up over the positions of each, so that per-sample gradients of the
bias cost nothing extra.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.activations import Activation, activation, activation_backward
from dpsgd.kernels.dispatch import fold, require_unbatched, runs_on_triton
from dpsgd.kernels.image_blocks import tiling
from dpsgd.kernels.tape import active_tape, leaf_grad

try:
    import triton
    import triton.language as tl

    from dpsgd.kernels.activations import activated, before_activation
    from dpsgd.kernels.image_blocks import place_of_program
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "bias_activation",
    "bias_activation_backward_reference",
    "bias_activation_backward_triton",
    "bias_activation_reference",
    "bias_activation_triton",
]

_ELEMENTS = 8192  # that a program takes at a time
_SPAN = 2048  # positions of an image, for one program of the backward pass
_NUM_WARPS = 8


def bias_activation(x: Tensor, bias: Tensor, kind: Activation) -> Tensor:
    """Returns the activation of `x + bias`, differentiable, also under vmap(grad).

    Args:
        x: (N, C, H, W) images.
        bias: (C,) float32 parameter that is added to every image.
        kind: Of the activation.

    Returns:
        (N, C, H, W) of the type of `x`.
    """
    if active_tape() is None and not _has_kernel(x):
        return activation(x + bias.to(x.dtype).view(-1, 1, 1), kind)
    y: Tensor = _BiasActivation.apply(x, bias, kind)
    return y


def _has_kernel(x: Tensor) -> bool:
    """Returns whether the kernels take such images."""
    return x.dtype != torch.float64 and runs_on_triton(x)


class _BiasActivation(Function):
    """Forward: the images of all examples in one launch."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor, kind: Activation) -> Tensor:
        run = bias_activation_triton if _has_kernel(x) else bias_activation_reference
        return run(x, bias, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.kind = inputs
        # Where ReLU is zero its output tells, which the next layer keeps anyway.
        ctx.save_for_backward(output if ctx.kind == "relu" else x, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, bias = ctx.saved_tensors
        grad_x, rows = _Backward.apply(grad_y, kept, bias, ctx.kind)
        return grad_x, leaf_grad(bias, rows), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, bias: Tensor, kind: Activation
    ) -> tuple[Tensor, int]:
        require_unbatched("bias_activation", in_dims[1:2])
        images = fold(x, in_dims[0], info.batch_size)
        y: Tensor = _BiasActivation.apply(images, bias, kind)
        return y.unflatten(0, (info.batch_size, -1)), 0


class _Backward(Function):
    """Backward: gradients of the images, and of the bias for every image."""

    @staticmethod
    def forward(
        grad_y: Tensor, kept: Tensor, bias: Tensor, kind: Activation
    ) -> tuple[Tensor, Tensor]:
        run = bias_activation_backward_reference
        run = bias_activation_backward_triton if _has_kernel(kept) else run
        return run(grad_y, kept, bias, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        grad_y: Tensor,
        kept: Tensor,
        bias: Tensor,
        kind: Activation,
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        require_unbatched("bias_activation", in_dims[2:3])
        grad_y, kept = (
            fold(one, dim, info.batch_size)
            for one, dim in ((grad_y, in_dims[0]), (kept, in_dims[1]))
        )
        outputs = _Backward.apply(grad_y, kept, bias, kind)
        return tuple(one.unflatten(0, (info.batch_size, -1)) for one in outputs), (0, 0)


def bias_activation_reference(x: Tensor, bias: Tensor, kind: Activation) -> Tensor:
    """Returns the activation of (N, C, H, W) images and (C,) bias, in PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) + bias.to(wide).view(-1, 1, 1)
    return activation(value, kind).to(x.dtype)


def bias_activation_backward_reference(
    grad_y: Tensor, kept: Tensor, bias: Tensor, kind: Activation
) -> tuple[Tensor, Tensor]:
    """Returns gradients of the images, and of the bias for every image, in PyTorch.

    Args:
        grad_y: (N, C, H, W) gradient of the output.
        kept: The output of ReLU, but the input x of GELU.
        bias: (C,).
        kind: Of the activation.

    Returns:
        (N, C, H, W) in the type of `kept`; (N, C) float32 or wider.
    """
    wide = torch.promote_types(kept.dtype, torch.float32)
    value = kept.to(wide)
    if kind == "gelu":
        value = value + bias.to(wide).view(-1, 1, 1)
    grad = activation_backward(grad_y.to(wide), value, kind)
    return grad.to(kept.dtype), grad.sum((2, 3))


def bias_activation_triton(x: Tensor, bias: Tensor, kind: Activation) -> Tensor:
    """Does what `bias_activation_reference` does, in one Triton launch."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    _activation_kernel[(triton.cdiv(x.numel(), _ELEMENTS),)](
        x,
        bias,
        y,
        x.numel(),
        C=x.shape[1],
        KIND=kind,
        BLOCK=_ELEMENTS,
        num_warps=_NUM_WARPS,
    )
    return y


def bias_activation_backward_triton(
    grad_y: Tensor, kept: Tensor, bias: Tensor, kind: Activation
) -> tuple[Tensor, Tensor]:
    """Does what `bias_activation_backward_reference` does, in one launch and a sum."""
    grad_y, kept = (
        one.contiguous(memory_format=torch.channels_last) for one in (grad_y, kept)
    )
    num_images, channels, height, width = kept.shape
    grad_x = torch.empty_like(kept)
    num_positions = height * width
    num_parts = triton.cdiv(num_positions, _SPAN)
    rows = torch.empty(num_parts, num_images, channels, device=kept.device)
    taken, num_blocks = tiling(channels, num_positions, _ELEMENTS)
    _activation_backward_kernel[(num_images * num_blocks, num_parts)](
        grad_y,
        kept,
        bias,
        grad_x,
        rows,
        num_positions,
        _SPAN,
        C=channels,
        KIND=kind,
        **taken,
    )
    return grad_x, rows[0] if num_parts == 1 else rows.sum(0)


if triton is not None:

    @triton.jit
    def _activation_kernel(
        x,
        bias,
        y,
        num_elements,
        C: tl.constexpr,
        KIND: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program: some pixels of channels-last images."""
        first = tl.program_id(0).to(tl.int64) * BLOCK
        at = first + tl.arange(0, BLOCK)
        inside = at < num_elements
        channel = ((first % C).to(tl.int32) + tl.arange(0, BLOCK)) % C
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(bias + channel, mask=inside, other=0.0)
        value = activated(value, KIND)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _activation_backward_kernel(
        grad_y,
        kept,
        bias,
        grad_x,
        rows,
        num_positions,
        span,
        C: tl.constexpr,
        KIND: tl.constexpr,
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One program: some channels of an image, over some of its positions."""
        image, channel, exists = place_of_program(C, BLOCK_C)
        part = tl.program_id(1)
        added = tl.load(bias + channel, mask=exists, other=0.0)[None, :]
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
        end = tl.minimum(num_positions, (part + 1) * span)
        for start in range(part * span, end, ROWS):
            position = start + tl.arange(0, ROWS)
            inside = (position < end)[:, None] & exists[None, :]
            at = (image * num_positions + position[:, None]) * C + channel[None, :]
            grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
            if KIND == "gelu":  # of ReLU the output is kept
                value += added
            grad = before_activation(grad, value, KIND)
            total += tl.where(inside, grad, 0.0)
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        num_images = tl.num_programs(0) // ((C + BLOCK_C - 1) // BLOCK_C)
        place = (part * num_images + image) * C + channel
        tl.store(rows + place, tl.sum(total, axis=0), mask=exists)
