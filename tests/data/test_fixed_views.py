"""Numbers by content: uniform, independent, and nobody else's business."""

import numpy as np
import pytest

from dpsgd.data.fixed_views import FixedNumbers

NUM_KEYS = 4_000


def keys() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.arange(NUM_KEYS, dtype=np.uint64)  # the worst: hashes are spread already


def test_numbers_follow_from_a_key_alone() -> None:
    everything = FixedNumbers(keys(), stream=0).random((NUM_KEYS, 3, 2))
    some = FixedNumbers(keys()[[5, 900, 5]], stream=0).random((3, 3, 2))

    np.testing.assert_array_equal(some, everything[[5, 900, 5]])
    other = FixedNumbers(keys(), stream=1).random((NUM_KEYS, 3, 2))
    assert not (other == everything).any()
    assert FixedNumbers(keys()[:0], stream=0).random((0, 3)).shape == (0, 3)


def test_numbers_are_uniform_and_independent() -> None:
    numbers = FixedNumbers(keys(), stream=0).random((NUM_KEYS, 16))
    assert numbers.min() >= 0
    assert numbers.max() < 1

    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 63 + 5 * np.sqrt(2 * 63)  # 5 standard deviations
    for axis in (0, 1):
        moved = np.roll(numbers, 1, axis=axis)
        correlation = np.corrcoef(numbers.ravel(), moved.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(numbers.size)


@pytest.mark.parametrize("high", [1, 2, 162])
def test_integers_take_all_values_alike(high: int) -> None:
    drawn = FixedNumbers(keys(), stream=0).integers(high, size=(NUM_KEYS, 16))
    counts = np.bincount(drawn.ravel(), minlength=high)

    assert len(counts) == high
    expected = drawn.size / high
    assert (np.abs(counts - expected) < 5.5 * np.sqrt(expected) + 1e-9).all()
