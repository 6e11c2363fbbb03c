"""Per-sample weight gradient of a convolution, by implicit matrix product.

vmap lowers it to a grouped convolution, which takes several times as long as cuDNN's
ordinary weight gradient. Here each example is one matrix product of its output
gradients and its shifted inputs over all positions of all its views.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "conv_weight_grad",
    "conv_weight_grad_reference",
    "conv_weight_grad_triton",
]

_POSITIONS = 64


def conv_weight_grad(
    x: Tensor, grad_y: Tensor, *, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Returns each example's gradient with respect to weights and bias.

    Args:
        x: (M, K, I, H, W) inputs of M examples with K views.
        grad_y: (M, K, O, HO, WO) gradients of the outputs, of the type of `x`.
        kernel_size: Side of the square kernel.
        stride: Step between output positions.
        padding: Zeros around the input.

    Returns:
        (M, O, KH, KW, I) for the weights and (M, O) for the bias, float32 or wider,
        contiguous, summed over views.
    """
    if runs_on_triton(x):
        return conv_weight_grad_triton(
            x, grad_y, kernel_size=kernel_size, stride=stride, padding=padding
        )
    return conv_weight_grad_reference(
        x, grad_y, kernel_size=kernel_size, stride=stride, padding=padding
    )


def conv_weight_grad_reference(
    x: Tensor, grad_y: Tensor, *, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Does what `conv_weight_grad` does, in PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    num_examples, _, in_channels = x.shape[:3]
    columns = F.unfold(
        x.flatten(0, 1).to(wide), kernel_size, padding=padding, stride=stride
    )  # (M * K, I * KH * KW, P)
    columns = columns.unflatten(0, (num_examples, -1))
    rows = grad_y.to(wide).flatten(3)  # (M, K, O, P)
    weight_grad = torch.einsum("mkop,mkcp->moc", rows, columns)
    shape = (in_channels, kernel_size, kernel_size)
    weight_grad = weight_grad.unflatten(2, shape).permute(0, 1, 3, 4, 2)
    return weight_grad.contiguous(), rows.sum((1, 3))


def conv_weight_grad_triton(
    x: Tensor, grad_y: Tensor, *, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Does what `conv_weight_grad` does, in one Triton launch, for sides 1 and 3."""
    assert kernel_size in (1, 3)
    num_examples, num_views, in_channels, height, width = x.shape
    out_channels, out_height, out_width = grad_y.shape[2:]
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    grad_y = grad_y.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    shape = (num_examples, out_channels, kernel_size, kernel_size, in_channels)
    weight_grad = torch.empty(shape, device=x.device, dtype=torch.float32)
    bias_grad = torch.empty(shape[:2], device=x.device, dtype=torch.float32)
    block_o = _block(out_channels, most=128)
    block_i = _block(in_channels, most=64 if kernel_size > 1 else 128)
    grid = (
        num_examples * kernel_size,
        triton.cdiv(out_channels, block_o),
        triton.cdiv(in_channels, block_i),
    )
    _conv_weight_grad_kernel[grid](
        x,
        grad_y,
        weight_grad,
        bias_grad,
        (num_views, height, width, out_height * out_width, out_width),
        IN=in_channels,
        OUT=out_channels,
        STRIDE=stride,
        PADDING=padding,
        SIDE=kernel_size,
        BLOCK_P=_POSITIONS,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=4 if block_o <= 64 else 8,
        num_stages=3,
    )
    return weight_grad, bias_grad


def _block(channels: int, *, most: int) -> int:
    """Returns the channels that one program takes: a power of two, at least 16."""
    return min(most, max(16, triton.next_power_of_2(channels)))


if triton is not None:

    @triton.jit
    def _conv_weight_grad_kernel(
        x,
        grad_y,
        weight_grad,
        bias_grad,
        sizes,
        IN: tl.constexpr,
        OUT: tl.constexpr,
        STRIDE: tl.constexpr,
        PADDING: tl.constexpr,
        SIDE: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_O: tl.constexpr,
        BLOCK_I: tl.constexpr,
    ):
        """One program: one example, one kernel row, a tile of channels."""
        num_views, height, width, per_image, out_width = sizes
        example, kernel_row = tl.program_id(0) // SIDE, tl.program_id(0) % SIDE
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
        is_out = (o < OUT)[:, None]
        zero = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        total_0, total_1, total_2 = zero, zero, zero  # one for each kernel column
        total_bias = tl.zeros((BLOCK_O, 16), tl.float32)
        ones = tl.full((BLOCK_P, 16), 1.0, x.dtype.element_ty)
        sums_bias = (kernel_row == 0) & (tl.program_id(2) == 0)
        for start in range(0, num_views * per_image, BLOCK_P):
            position = start + tl.arange(0, BLOCK_P)
            valid = position < num_views * per_image
            image = (example * num_views + position // per_image).to(tl.int64)
            place = position % per_image
            at = (image * per_image + place)[None, :] * OUT + o[:, None]  # (O, P)
            grad = tl.load(grad_y + at, mask=valid[None, :] & is_out, other=0.0)
            if sums_bias:  # the matrix unit adds up positions faster than tl.sum
                total_bias = tl.dot(grad, ones, total_bias, input_precision="ieee")
            in_row = place // out_width * STRIDE - PADDING + kernel_row
            column = place % out_width * STRIDE - PADDING
            valid = valid & (in_row >= 0) & (in_row < height)
            row = x + ((image * height + in_row) * width)[:, None] * IN + i[None, :]
            total_0 = _multiply(total_0, grad, row, column, valid, width, i, IN)
            if SIDE == 3:
                total_1 = _multiply(total_1, grad, row, column + 1, valid, width, i, IN)
                total_2 = _multiply(total_2, grad, row, column + 2, valid, width, i, IN)
        filters = example.to(tl.int64) * OUT + o
        at = (filters * SIDE + kernel_row)[:, None] * SIDE * IN + i[None, :]
        inside = is_out & (i < IN)[None, :]
        _store(weight_grad + at, inside, total_0, total_1, total_2, IN, SIDE)
        if sums_bias:  # sixteen equal columns
            tl.store(bias_grad + filters, tl.max(total_bias, axis=1), mask=o < OUT)

    @triton.jit
    def _multiply(total, grad, row, column, valid, width, channel, IN: tl.constexpr):
        """Adds gradients (O, P) times one pixel a position (P, I), zero outside."""
        valid = valid & (column >= 0) & (column < width)
        mask = valid[:, None] & (channel < IN)[None, :]
        pixel = tl.load(row + column[:, None] * IN, mask=mask, other=0.0)
        return tl.dot(grad, pixel, total, input_precision="ieee")

    @triton.jit
    def _store(
        pointer, mask, first, second, third, IN: tl.constexpr, SIDE: tl.constexpr
    ):
        """Writes the kernel columns that there are."""
        tl.store(pointer, first, mask=mask)
        if SIDE == 3:
            tl.store(pointer + IN, second, mask=mask)
            tl.store(pointer + 2 * IN, third, mask=mask)
