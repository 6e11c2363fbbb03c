"""How kernels that walk over the positions of an image share it among programs.

A program takes some channels of one channels-last image, at a few positions at a time,
and may add up what it finds at them.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["tiling"]

_CHANNELS = 64  # of an image, for a program: a cache line
_NUM_WARPS = 8


def tiling(
    channels: int, num_positions: int, num_elements: int
) -> tuple[dict[str, int], int]:
    """Returns what a program takes at a time, and into how many blocks C falls.

    Args:
        channels: C.
        num_positions: Of an image.
        num_elements: That a program takes at a time, a power of two.
    """
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    rows = min(num_elements // block, triton.next_power_of_2(num_positions))
    taken = {"BLOCK_C": block, "ROWS": rows, "num_warps": _NUM_WARPS}
    return taken, triton.cdiv(channels, block)


if triton is not None:

    @triton.jit
    def place_of_program(C: tl.constexpr, BLOCK_C: tl.constexpr):
        """Returns a program's image, its channels, and which of them exist."""
        BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        image = (tl.program_id(0) // BLOCKS).to(tl.int64)
        channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        return image, channel, channel < C
