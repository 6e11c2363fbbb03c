"""The kernel of `conv_weight_grad`: an implicit matrix product for each example."""

from typing import Any

import torch
from torch import Tensor

from dpsgd.kernels.geometry import ConvGeometry

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "conv_weight_grad_moments_triton",
    "conv_weight_grad_sum_triton",
    "conv_weight_grad_triton",
]

_PROGRAMS = 264  # two for each processor of an H100
_STORE, _MOMENTS, _SUM = 0, 1, 2


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
    launch(_STORE, out, out, num_rows=len(x))
    return out


def conv_weight_grad_moments_triton(
    x: Tensor, grad_y: Tensor, direction: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Does what `conv_weight_grad_moments` does, in one Triton launch and a sum."""
    launch = _Launch(x, grad_y, geometry)
    shape = (launch.num_parts, 3, len(x), grad_y.shape[2])
    parts = torch.empty(shape, device=x.device, dtype=torch.float32)
    launch(_MOMENTS, parts, direction.contiguous(), num_rows=len(x))
    return parts.sum(0)


def conv_weight_grad_sum_triton(
    x: Tensor, grad_y: Tensor, factors: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Does what `conv_weight_grad_sum` does, in one Triton launch and a sum."""
    # Two accumulators a program instead of one: half the tile keeps them in registers.
    launch = _Launch(x, grad_y, geometry, most=64)
    num_rows = min(len(x), max(1, _PROGRAMS // launch.num_tiles))
    shape = (num_rows, *launch.weight_shape)
    parts = torch.empty(shape, device=x.device, dtype=torch.float32)
    launch(_SUM, parts, factors.contiguous(), num_rows=num_rows)
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
        self.num_tiles = self.num_parts * self._num_outs
        self._taps = taps

    def __call__(self, mode: int, out: Tensor, other: Tensor, *, num_rows: int) -> None:
        """Runs `num_rows` programs a tile, among which the examples are dealt out."""
        if num_rows == 0:
            return
        side, stride, padding, groups = self._geometry
        # As many positions at a time as shared memory has room for.
        is_large = max(self._block_o, self._block_f) > 64
        positions = (128 if is_large else 256) // self._x.element_size()
        width = min(positions, triton.next_power_of_2(self._sizes[5]))
        x, grad_y = self._x, self._grad_y
        if not self._gathers:
            x, grad_y = self._descriptors(positions // width, width)
        grid = (num_rows * self._taps, self._num_outs, self._num_columns)
        _conv_weight_grad_kernel[grid](
            x,
            grad_y,
            out,
            other,
            num_rows,
            self._sizes,
            CHANNELS=(self.weight_shape[3], self.weight_shape[0] // groups, groups),
            SHAPE=(side, stride, padding),
            GATHERS=self._gathers,
            BLOCK=(positions // width, width, self._block_o, self._block_f),
            MODE=mode,
            num_warps=8 if mode == _SUM or self._is_wide else 4,
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


if triton is not None:
    # What is done with an example's gradient.
    STORE = tl.constexpr(_STORE)
    MOMENTS = tl.constexpr(_MOMENTS)
    SUM = tl.constexpr(_SUM)

    @triton.jit
    def _conv_weight_grad_kernel(
        x,
        grad_y,
        out,
        other,
        num_rows,
        sizes,
        CHANNELS: tl.constexpr,
        SHAPE: tl.constexpr,
        GATHERS: tl.constexpr,
        BLOCK: tl.constexpr,
        MODE: tl.constexpr,
    ):
        """One program: a tile of the weight, for one example or every num_rows-th."""
        SIDE: tl.constexpr = SHAPE[0]
        TAPS: tl.constexpr = 1 if GATHERS else SIDE  # columns that share a pixel's row
        OUT: tl.constexpr = CHANNELS[1]
        BLOCK_O: tl.constexpr = BLOCK[2]
        BLOCK_F: tl.constexpr = BLOCK[3]
        TILES: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
        row, kernel_row = tl.program_id(0) // TAPS, tl.program_id(0) % TAPS
        group, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
        at = (kernel_row, group, tile * BLOCK_O, tl.program_id(2) * BLOCK_F)
        if MODE == SUM:
            zero = tl.zeros((BLOCK_O, BLOCK_F), tl.float32)
            sum_0, sum_1, sum_2 = zero, zero, zero
            for example in range(row, sizes[0], num_rows):
                factor = tl.load(other + example)
                if factor > 0:
                    grad_0, grad_1, grad_2 = _example_grad(
                        x, grad_y, example, at, sizes, CHANNELS, SHAPE, GATHERS, BLOCK
                    )
                    sum_0 += factor * grad_0
                    sum_1 += factor * grad_1
                    sum_2 += factor * grad_2
        else:
            sum_0, sum_1, sum_2 = _example_grad(
                x, grad_y, row, at, sizes, CHANNELS, SHAPE, GATHERS, BLOCK
            )
        if MODE == MOMENTS:
            part = kernel_row * tl.num_programs(2) + tl.program_id(2)
            out += (part * 3 * sizes[0] + row) * OUT * CHANNELS[2]
            tiles = (sum_0, sum_1, sum_2)
            _store_moments(out, other, sizes[0], at, tiles, CHANNELS, SIDE, TAPS)
        else:
            out += row.to(tl.int64) * OUT * CHANNELS[2] * SIDE * SIDE * CHANNELS[0]
            _store(out, at, (sum_0, sum_1, sum_2), CHANNELS, SIDE, TAPS)

    @triton.jit
    def _example_grad(
        x,
        grad_y,
        example,
        at,
        sizes,
        CHANNELS: tl.constexpr,
        SHAPE: tl.constexpr,
        GATHERS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Returns one example's tile for each tap of the row: a sum over positions."""
        kernel_row, group, first_o, first_f = at
        SIDE: tl.constexpr = SHAPE[0]
        ROWS: tl.constexpr = BLOCK[0]
        WIDTH: tl.constexpr = BLOCK[1]
        BLOCK_O: tl.constexpr = BLOCK[2]
        BLOCK_F: tl.constexpr = BLOCK[3]
        across = tl.cdiv(sizes[5], WIDTH)
        per_image = tl.cdiv(sizes[4], ROWS) * across
        zero = tl.zeros((BLOCK_O, BLOCK_F), tl.float32)
        total_0, total_1, total_2 = zero, zero, zero
        for step in range(0, sizes[1] * per_image):
            image = example * sizes[1] + step // per_image
            top = step % per_image // across * ROWS
            left = step % across * WIDTH
            if GATHERS:
                corner = (image, top, left)
                total_0 = _gathered(
                    total_0, x, grad_y, corner, at, sizes, CHANNELS, SHAPE, BLOCK
                )
            else:
                o = group * CHANNELS[1] + first_o
                grad = grad_y.load([image, top, left, o])
                grad = tl.reshape(grad, (ROWS * WIDTH, BLOCK_O)).T  # (O, P)
                place = (image, top, left, group * CHANNELS[0] + first_f)
                PIXEL: tl.constexpr = CHANNELS[0] * CHANNELS[2]
                total_0 = _tap(
                    total_0, x, grad, place, kernel_row, 0, PIXEL, SHAPE, BLOCK
                )
                if SIDE == 3:
                    total_1 = _tap(
                        total_1, x, grad, place, kernel_row, 1, PIXEL, SHAPE, BLOCK
                    )
                    total_2 = _tap(
                        total_2, x, grad, place, kernel_row, 2, PIXEL, SHAPE, BLOCK
                    )
        return total_0, total_1, total_2

    @triton.jit
    def _tap(
        total,
        x,
        grad,
        place,
        kernel_row,
        TAP: tl.constexpr,
        PIXEL: tl.constexpr,
        SHAPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Adds gradients (O, P) times one pixel a position (P, F), zero outside."""
        image, top, left, channel = place
        STRIDE: tl.constexpr = SHAPE[1]
        PADDING: tl.constexpr = SHAPE[2]
        POSITIONS: tl.constexpr = BLOCK[0] * BLOCK[1]
        BLOCK_F: tl.constexpr = BLOCK[3]
        # Shifted by whole padding first: divisions of negative numbers round up.
        below = kernel_row + STRIDE * PADDING - PADDING
        right: tl.constexpr = TAP + STRIDE * PADDING - PADDING
        row = top + below // STRIDE - PADDING
        column = left + right // STRIDE - PADDING
        channel += right % STRIDE * PIXEL
        pixels = x.load([image, row, below % STRIDE, column, channel])
        pixels = tl.reshape(pixels, (POSITIONS, BLOCK_F))
        return tl.dot(grad, pixels, total, input_precision="ieee")

    @triton.jit
    def _gathered(
        total,
        x,
        grad_y,
        corner,
        at,
        sizes,
        CHANNELS: tl.constexpr,
        SHAPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Adds gradients (O, P) times gathered pixels (P, F), zero outside."""
        image, top, left = corner
        _, group, first_o, first_f = at
        _, _, height, width, out_height, out_width = sizes
        IN: tl.constexpr = CHANNELS[0]
        OUT: tl.constexpr = CHANNELS[1]
        SIDE: tl.constexpr = SHAPE[0]
        POSITIONS: tl.constexpr = BLOCK[0] * BLOCK[1]
        BLOCK_O: tl.constexpr = BLOCK[2]
        BLOCK_F: tl.constexpr = BLOCK[3]
        image = image.to(tl.int64)
        position = tl.arange(0, POSITIONS)
        row, column = top + position // BLOCK[1], left + position % BLOCK[1]
        valid = (row < out_height) & (column < out_width)
        o = first_o + tl.arange(0, BLOCK_O)
        pixel = (image * out_height + row) * out_width + column
        where = pixel[None, :] * (OUT * CHANNELS[2]) + (group * OUT + o)[:, None]
        mask = valid[None, :] & (o < OUT)[:, None]
        grad = tl.load(grad_y + where, mask=mask, other=0.0)
        f = first_f + tl.arange(0, BLOCK_F)
        row = (row * SHAPE[1] - SHAPE[2])[:, None] + (f // (SIDE * IN))[None, :]
        column = (column * SHAPE[1] - SHAPE[2])[:, None] + (f // IN % SIDE)[None, :]
        mask = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        mask = mask & valid[:, None] & (f < SIDE * SIDE * IN)[None, :]
        pixel = (image * height + row) * width + column
        where = pixel * (IN * CHANNELS[2]) + (group * IN + f % IN)[None, :]
        pixels = tl.load(x + where, mask=mask, other=0.0)
        return tl.dot(grad, pixels, total, input_precision="ieee")

    @triton.jit
    def _weights_of(
        at,
        BLOCK_O: tl.constexpr,
        BLOCK_F: tl.constexpr,
        CHANNELS: tl.constexpr,
        SIDE: tl.constexpr,
        TAPS: tl.constexpr,
    ):
        """Returns where a tile's weights lie (O, F), and which of them exist."""
        kernel_row, group, first_o, first_f = at
        IN: tl.constexpr = CHANNELS[0]
        COLUMNS: tl.constexpr = SIDE * SIDE * IN if TAPS < SIDE else IN
        o, f = first_o + tl.arange(0, BLOCK_O), first_f + tl.arange(0, BLOCK_F)
        inside = (o < CHANNELS[1])[:, None] & (f < COLUMNS)[None, :]
        o += group * CHANNELS[1]
        return o[:, None] * SIDE * SIDE * IN + kernel_row * TAPS * IN + f[
            None, :
        ], inside

    @triton.jit
    def _store(
        out, at, tiles, CHANNELS: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr
    ):
        """Writes the tile of each tap."""
        BLOCK_O: tl.constexpr = tiles[0].shape[0]
        BLOCK_F: tl.constexpr = tiles[0].shape[1]
        where, inside = _weights_of(at, BLOCK_O, BLOCK_F, CHANNELS, SIDE, TAPS)
        for tap in tl.static_range(TAPS):
            value = tiles[tap].to(out.dtype.element_ty)
            tl.store(out + where + tap * CHANNELS[0], value, mask=inside)

    @triton.jit
    def _store_moments(
        out,
        direction,
        num_examples,
        at,
        tiles,
        CHANNELS: tl.constexpr,
        SIDE: tl.constexpr,
        TAPS: tl.constexpr,
    ):
        """Writes each row's sums (O,) of g * g, g, and g * u over columns and taps."""
        BLOCK_O: tl.constexpr = tiles[0].shape[0]
        BLOCK_F: tl.constexpr = tiles[0].shape[1]
        where, inside = _weights_of(at, BLOCK_O, BLOCK_F, CHANNELS, SIDE, TAPS)
        zero = tl.zeros((BLOCK_O,), tl.float32)
        squares, plain, dots = zero, zero, zero
        for tap in tl.static_range(TAPS):
            # Columns past the last read what lies beside: other channels, or zeros.
            grad = tl.where(inside, tiles[tap], 0.0)
            u = tl.load(direction + where + tap * CHANNELS[0], mask=inside, other=0.0)
            squares += tl.sum(grad * grad, 1)
            plain += tl.sum(grad, 1)
            dots += tl.sum(grad * u, 1)
        o = at[2] + tl.arange(0, BLOCK_O)
        out += at[1] * CHANNELS[1] + o
        along = num_examples * CHANNELS[1] * CHANNELS[2]
        tl.store(out, squares, mask=o < CHANNELS[1])
        tl.store(out + along, plain, mask=o < CHANNELS[1])
        tl.store(out + 2 * along, dots, mask=o < CHANNELS[1])
