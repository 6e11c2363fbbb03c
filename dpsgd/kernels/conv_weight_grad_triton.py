"""Launches of `conv_weight_grad`: tiles of a weight, and how they are read."""

from typing import Any

import torch
from torch import Tensor

from dpsgd.kernels.geometry import ConvGeometry

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from dpsgd.kernels.conv_weight_grad_device import conv_weight_grad_kernel
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "conv_weight_grad_moments_triton",
    "conv_weight_grad_sum_triton",
    "conv_weight_grad_triton",
]

_PROGRAMS = 264  # two for each processor of an H100


def conv_weight_grad_triton(
    x: Tensor,
    grad_y: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Does what `conv_weight_grad` does, in one Triton launch."""
    launch = _Launch(x, grad_y, geometry)
    shape = (len(x), *launch.weight_shape)
    out = torch.empty(shape, device=x.device, dtype=dtype or torch.float32)
    launch("store", out, out, num_rows=len(x))
    return out


def conv_weight_grad_moments_triton(
    x: Tensor, grad_y: Tensor, direction: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Does what `conv_weight_grad_moments` does, in one Triton launch and a sum."""
    # The direction takes registers, too: half the tile leaves room for it.
    launch = _Launch(x, grad_y, geometry, most=64)
    shape = (launch.num_parts, 3, len(x), grad_y.shape[2])
    parts = torch.empty(shape, device=x.device, dtype=torch.float32)
    num_rows = launch.most_rows if launch.takes_one_step else len(x)
    launch("moments", parts, direction.contiguous(), num_rows=num_rows)
    return parts.sum(0)


def conv_weight_grad_sum_triton(
    x: Tensor, grad_y: Tensor, factors: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Does what `conv_weight_grad_sum` does, in one Triton launch and a sum."""
    # Two accumulators a program instead of one: half the tile keeps them in registers.
    launch = _Launch(x, grad_y, geometry, most=64)
    num_rows = launch.most_rows
    shape = (num_rows, *launch.weight_shape)
    parts = torch.empty(shape, device=x.device, dtype=torch.float32)
    launch("sum", parts, factors.contiguous(), num_rows=num_rows)
    return parts.sum(0)


class _Launch:
    """Tiles of a weight, and how programs read what they are made of.

    A tile is some output channels by some columns. Where channels fill whole vectors, a
    tile is one row of the kernel for some input channels, and whole rows of pixels are
    read through tensor descriptors, which fill in the zeros around an image; else it is
    any columns (KH, KW, I), whose pixels are gathered one by one.

    Args:
        x: (M, K, I, H, W) inputs.
        grad_y: (M, K, O, HO, WO) gradients of the outputs.
        geometry: Of the convolution.
        most: Channels of a tile, at most.
    """

    def __init__(
        self, x: Tensor, grad_y: Tensor, geometry: ConvGeometry, *, most: int = 128
    ) -> None:
        side, stride, _, groups = geometry
        self._sizes = (len(x), x.shape[1], *x.shape[3:], *grad_y.shape[3:])
        self._geometry = geometry
        self._x, self._grad_y = (_channels_last(one) for one in (x, grad_y))
        channels, out = x.shape[2] // groups, grad_y.shape[2] // groups
        self.weight_shape = (grad_y.shape[2], side, side, channels)
        vector = 16 // x.element_size()
        self._gathers = (
            side not in (1, 3)
            or bool(channels % vector or out % vector)
            or bool(x.shape[3] % stride or x.shape[4] % stride)
        )
        taps = 1 if self._gathers else side
        columns = side * side * channels if self._gathers else channels
        most = min(most, 256 // x.element_size())
        self._block_o = _power_of_two(out, most=most)
        self._block_f = _power_of_two(columns, most=most)
        # A gathered pixel has an address too: four warps spill at 64 by 128 elements.
        most_elements = 4096 if self._gathers else 8192
        self._is_wide = self._block_o * self._block_f > most_elements
        self._num_columns = triton.cdiv(columns, self._block_f)
        self._num_outs = groups * triton.cdiv(out, self._block_o)
        self.num_parts = taps * self._num_columns
        self._taps = taps
        # As many positions at a time as shared memory has room for.
        is_large = max(self._block_o, self._block_f) > 64
        positions = (128 if is_large else 256) // x.element_size()
        width = min(positions, triton.next_power_of_2(self._sizes[5]))
        rows = min(positions // width, triton.next_power_of_2(self._sizes[4]))
        rows = max(rows, 16 // width)  # a matrix product takes no fewer
        self._positions = (rows, width)
        # Then the loop over examples reads ahead, in place of that over positions.
        steps = triton.cdiv(self._sizes[4], rows)
        steps *= triton.cdiv(self._sizes[5], width) * self._sizes[1]
        self.takes_one_step = steps == 1
        self.num_tiles = self.num_parts * self._num_outs

    @property
    def most_rows(self) -> int:
        """Rows of programs that fill the device, each of which takes some examples."""
        return min(self._sizes[0], max(1, _PROGRAMS // self.num_tiles))

    def __call__(self, mode: str, out: Tensor, other: Tensor, *, num_rows: int) -> None:
        """Runs `num_rows` programs a tile, among which the examples are dealt out.

        Args:
            mode: What is done with an example's gradient: `store`, `moments` or `sum`.
            out: Where that goes.
            other: The direction of moments, or the factors of a sum.
            num_rows: M, or fewer if programs walk over examples.
        """
        if num_rows == 0:
            return
        side, stride, padding, groups = self._geometry
        x, grad_y = self._x, self._grad_y
        if not self._gathers:
            x, grad_y = self._descriptors(*self._positions)
        grid = (num_rows * self._taps, self._num_outs, self._num_columns)
        conv_weight_grad_kernel[grid](
            x,
            grad_y,
            out,
            other,
            num_rows,
            self._sizes,
            CHANNELS=(self.weight_shape[3], self.weight_shape[0] // groups, groups),
            SHAPE=(side, stride, padding),
            READS=(self._gathers, self.takes_one_step),
            BLOCK=(*self._positions, self._block_o, self._block_f),
            MODE=mode,
            num_warps=8 if mode == "sum" or self._is_wide else 4,
            num_stages=3,
        )

    def _descriptors(self, rows: int, width: int) -> tuple[Any, Any]:
        """Returns descriptors that read one tile of positions of one image."""
        stride = self._geometry.stride
        images, in_channels, height, in_width = self._x.shape
        # A step of two pixels is one step over pairs of them.
        x = self._x.permute(0, 2, 3, 1).view(
            images, height // stride, stride, in_width // stride, stride * in_channels
        )
        grad_y = self._grad_y.permute(0, 2, 3, 1)  # (M * K, HO, WO, O)
        return (
            TensorDescriptor.from_tensor(x, [1, rows, 1, width, self._block_f]),
            TensorDescriptor.from_tensor(grad_y, [1, rows, width, self._block_o]),
        )


def _channels_last(images: Tensor) -> Tensor:
    """Returns the images of all examples, laid out pixel by pixel."""
    return images.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _power_of_two(size: int, *, most: int) -> int:
    """Returns what one program takes of a size: at least 16, at most `most`."""
    taken: int = min(most, max(16, triton.next_power_of_2(size)))
    return taken
