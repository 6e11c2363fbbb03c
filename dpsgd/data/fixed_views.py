"""Numbers that follow from an example's image alone: its views in every step and run.

They are public, so that they may follow from nothing but the example itself: were they
drawn by its row, removing one example would change the views, and so the gradients, of
all that come after it, and the sum by more than its sensitivity.
"""

import math
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["FixedNumbers"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_UNIT = 2.0**-53  # of a float64 in [0, 1)


@final
class FixedNumbers:
    """Stands for a random generator where views are drawn.

    Args:
        keys: (R,) uint64, what tells the images of the examples apart.
        stream: Which of several independent sets of numbers, >= 0.

    Source: Steele, Lea and Flood 2014, SplitMix64, by counter.
    """

    def __init__(self, keys: NDArray[np.uint64], *, stream: int) -> None:
        with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
            self._keys = _mixed(keys + np.uint64(stream) * _GOLDEN)

    def random(self, size: tuple[int, ...]) -> NDArray[np.float64]:
        """Returns numbers (R, ...) in [0, 1), those of an example by its key alone."""
        num_examples, *shape = size
        assert num_examples == len(self._keys)
        count = np.arange(1, 1 + math.prod(shape), dtype=np.uint64)
        with np.errstate(over="ignore"):
            bits = _mixed(self._keys[:, None] + count * _GOLDEN)
        numbers = (bits >> np.uint64(11)).astype(np.float64) * _UNIT
        return numbers.reshape(size)

    def integers(self, high: int, *, size: tuple[int, ...]) -> NDArray[np.int64]:
        """Returns numbers (R, ...) in [0, high), for `high` far below 2^53."""
        return (high * self.random(size)).astype(np.int64)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns bits in which each depends on all of those given."""
    mixed: Any = bits
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)
