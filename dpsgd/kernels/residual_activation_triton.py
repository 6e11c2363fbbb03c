"""The kernels of `residual_activation`, for channels-last images."""

import torch
from torch import Tensor

from dpsgd.kernels.activations import Activation
from dpsgd.kernels.image_blocks import tiling

try:
    import triton
    import triton.language as tl

    from dpsgd.kernels.activations import activated, before_activation
    from dpsgd.kernels.image_blocks import place_of_program
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["residual_activation_backward_triton", "residual_activation_triton"]

_ELEMENTS = 4096  # that a program takes at a time, of each of up to four images
_SPAN = 2048  # positions of an image, for one program of the backward pass


def residual_activation_triton(
    shortcut: Tensor,
    branch: Tensor,
    *,
    shortcut_bias: Tensor | None,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor]:
    """Does what `residual_activation` does, in one Triton launch."""
    shortcut, branch = (
        one.contiguous(memory_format=torch.channels_last) for one in (shortcut, branch)
    )
    total, active = torch.empty_like(branch), torch.empty_like(branch)
    num_images, channels, height, width = branch.shape
    num_positions = height * width
    taken, num_blocks = tiling(channels, num_positions, _ELEMENTS)
    num_parts = triton.cdiv(num_positions, taken["ROWS"])
    _sum_kernel[(num_images * num_blocks, num_parts)](
        (shortcut, branch, total, active),
        bias if shortcut_bias is None else shortcut_bias,
        bias,
        scale,
        scale.expand(num_images, channels).stride(),
        num_positions,
        C=channels,
        KIND=kind,
        HAS_SHORTCUT_BIAS=shortcut_bias is not None,
        **taken,
    )
    return total, active


def residual_activation_backward_triton(
    grads: tuple[Tensor | None, Tensor | None],
    kept: Tensor,
    branch: Tensor,
    *,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Does what its reference does, in one launch and, of large images, a sum."""
    layout = torch.channels_last
    kept, branch = (one.contiguous(memory_format=layout) for one in (kept, branch))
    grad_total, grad_active = (
        None if one is None else one.contiguous(memory_format=layout) for one in grads
    )
    grad_shortcut, grad_branch = torch.empty_like(branch), torch.empty_like(branch)
    num_images, channels, height, width = branch.shape
    num_positions = height * width
    taken, num_blocks = tiling(channels, num_positions, _ELEMENTS)
    num_parts = triton.cdiv(num_positions, _SPAN)
    rows = torch.empty(2, num_parts, num_images, channels, device=branch.device)
    _backward_kernel[(num_images * num_blocks, num_parts)](
        (
            kept if grad_total is None else grad_total,
            kept if grad_active is None else grad_active,
        ),
        (kept, branch, grad_shortcut, grad_branch),
        bias,
        scale,
        scale.expand(num_images, channels).stride(),
        rows,
        num_positions,
        _SPAN,
        C=channels,
        KIND=kind,
        HAS_GRAD_TOTAL=grad_total is not None,
        HAS_GRAD_ACTIVE=grad_active is not None,
        **taken,
    )
    sums, products = (rows[:, 0] if num_parts == 1 else rows.sum(1)).unbind()
    return grad_shortcut, grad_branch, sums, products


if triton is not None:

    @triton.jit
    def _sum_kernel(
        images,
        shortcut_bias,
        bias,
        scale,
        scale_strides,
        num_positions,
        C: tl.constexpr,
        KIND: tl.constexpr,
        HAS_SHORTCUT_BIAS: tl.constexpr,
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One program: some channels of an image, at some of its positions."""
        shortcut, branch, total, active = images
        image, channel, exists = place_of_program(C, BLOCK_C)
        factor = _factors(scale, scale_strides, image, channel, exists)
        added = factor * tl.load(bias + channel, mask=exists, other=0.0)
        if HAS_SHORTCUT_BIAS:
            added += tl.load(shortcut_bias + channel, mask=exists, other=0.0)
        position = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = (position < num_positions)[:, None] & exists[None, :]
        at = (image * num_positions + position[:, None]) * C + channel[None, :]
        value = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        value = value * factor[None, :] + added[None, :]
        value += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
        value = activated(value, KIND)
        tl.store(active + at, value.to(active.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        grads,
        images,
        bias,
        scale,
        scale_strides,
        rows,
        num_positions,
        span,
        C: tl.constexpr,
        KIND: tl.constexpr,
        HAS_GRAD_TOTAL: tl.constexpr,
        HAS_GRAD_ACTIVE: tl.constexpr,
        BLOCK_C: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """One program: some channels of an image, over some of its positions."""
        kept, branch, grad_shortcut, grad_branch = images
        image, channel, exists = place_of_program(C, BLOCK_C)
        factor = _factors(scale, scale_strides, image, channel, exists)
        added = tl.load(bias + channel, mask=exists, other=0.0)[None, :]
        sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
        products = tl.zeros((ROWS, BLOCK_C), tl.float32)
        part, num_parts = tl.program_id(1), tl.num_programs(1)
        end = tl.minimum(num_positions, (part + 1) * span)
        for start in range(part * span, end, ROWS):
            position = start + tl.arange(0, ROWS)
            inside = (position < end)[:, None] & exists[None, :]
            at = (image * num_positions + position[:, None]) * C + channel[None, :]
            grad = tl.zeros((ROWS, BLOCK_C), tl.float32)
            if HAS_GRAD_ACTIVE:
                grad = tl.load(grads[1] + at, mask=inside, other=0.0).to(tl.float32)
                value = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
                grad = before_activation(grad, value, KIND)
            if HAS_GRAD_TOTAL:
                grad += tl.load(grads[0] + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            sums += grad  # zero where there is no image
            products += grad * (value + added)
            narrow = grad_branch.dtype.element_ty
            tl.store(grad_shortcut + at, grad.to(narrow), mask=inside)
            grad *= factor[None, :]
            tl.store(grad_branch + at, grad.to(narrow), mask=inside)
        num_images = tl.num_programs(0) // ((C + BLOCK_C - 1) // BLOCK_C)
        place = rows + (part * num_images + image) * C + channel
        tl.store(place, tl.sum(sums, axis=0), mask=exists)
        place += num_parts * num_images * C
        tl.store(place, tl.sum(products, axis=0), mask=exists)

    @triton.jit
    def _factors(scale, strides, image, channel, exists):
        """Returns the factors (BLOCK_C,) of an image's channels."""
        at = image * strides[0] + channel * strides[1]
        return tl.load(scale + at, mask=exists, other=0.0)
