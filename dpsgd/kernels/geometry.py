"""The geometry of a convolution."""

from typing import NamedTuple

__all__ = ["ConvGeometry"]


class ConvGeometry(NamedTuple):
    """How a convolution with a square kernel walks over its input.

    Attributes:
        kernel_size: Side of the kernel.
        stride: Step between output positions.
        padding: Zeros around the input.
        groups: Parts into which channels are divided; each sees its own inputs only.
    """

    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
