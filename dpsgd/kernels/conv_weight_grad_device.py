"""The kernel of `conv_weight_grad`: an implicit matrix product for each example."""

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["conv_weight_grad_kernel"]

if triton is not None:

    @triton.jit
    def conv_weight_grad_kernel(
        x,
        grad_y,
        out,
        other,
        num_rows,
        sizes,
        CHANNELS: tl.constexpr,
        SHAPE: tl.constexpr,
        READS: tl.constexpr,
        BLOCK: tl.constexpr,
        MODE: tl.constexpr,
    ):
        """One program: a tile of the weight, for one example or every num_rows-th.

        CHANNELS are those of a group, in and out, and the number of groups. READS tells
        whether pixels are gathered, and whether all positions are read at once.
        """
        SIDE: tl.constexpr = SHAPE[0]
        TAPS: tl.constexpr = 1 if READS[0] else SIDE  # columns that share a pixel's row
        OUT: tl.constexpr = CHANNELS[1]
        BLOCK_O: tl.constexpr = BLOCK[2]
        BLOCK_F: tl.constexpr = BLOCK[3]
        TILES: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
        row, kernel_row = tl.program_id(0) // TAPS, tl.program_id(0) % TAPS
        group, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
        at = (kernel_row, group, tile * BLOCK_O, tl.program_id(2) * BLOCK_F)
        if MODE == "store":
            tiles = _example_grad(
                x, grad_y, row, at, sizes, CHANNELS, SHAPE, READS, BLOCK
            )
        else:
            zero = tl.zeros((BLOCK_O, BLOCK_F), tl.float32)
            tiles = (zero, zero, zero)
            for example in range(row, sizes[0], num_rows):
                grads = _example_grad(
                    x, grad_y, example, at, sizes, CHANNELS, SHAPE, READS, BLOCK
                )
                if MODE == "moments":
                    part = kernel_row * tl.num_programs(2) + tl.program_id(2)
                    place = out + (part * 3 * sizes[0] + example) * OUT * CHANNELS[2]
                    _store_moments(
                        place, other, sizes[0], at, grads, CHANNELS, SIDE, TAPS
                    )
                else:
                    tiles = _add_scaled(tiles, grads, tl.load(other + example))
        if MODE != "moments":
            out += row.to(tl.int64) * OUT * CHANNELS[2] * SIDE * SIDE * CHANNELS[0]
            _store(out, at, tiles, CHANNELS, SIDE, TAPS)

    @triton.jit
    def _add_scaled(totals, tiles, factor):
        """Returns totals with each tile times the factor; none where that is 0."""
        # Chosen, not multiplied: inf and NaN do not reach the sum.
        return (
            totals[0] + tl.where(factor > 0, factor * tiles[0], 0.0),
            totals[1] + tl.where(factor > 0, factor * tiles[1], 0.0),
            totals[2] + tl.where(factor > 0, factor * tiles[2], 0.0),
        )

    @triton.jit
    def _example_grad(
        x,
        grad_y,
        example,
        at,
        sizes,
        CHANNELS: tl.constexpr,
        SHAPE: tl.constexpr,
        READS: tl.constexpr,
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
        for step in range(0, 1 if READS[1] else sizes[1] * per_image):
            image = example * sizes[1] + step // per_image
            top = step % per_image // across * ROWS
            left = step % across * WIDTH
            if READS[0]:
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
