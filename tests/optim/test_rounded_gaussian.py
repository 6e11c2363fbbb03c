"""Whole numbers from a Gaussian: their distribution, and each draw's rounding."""

import itertools
import os

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtri

from dpsgd.optim import rounded_gaussian as module
from dpsgd.optim.rounded_gaussian import magnitudes, rounded_gaussian

GRID_STD = 2.56 * 2**27  # that of a WRN-16-4 at epsilon 8


def give_words(monkeypatch: pytest.MonkeyPatch, words: list[int]) -> None:
    """Makes the operating system's bits these words of 64."""
    supply = iter(words)

    def urandom(size: int) -> bytes:
        given = list(itertools.islice(supply, size // 8))
        if size == 8:  # the further bits of one draw
            return given[0].to_bytes(8, "big")
        return np.array(given, np.uint64).tobytes()

    monkeypatch.setattr(os, "urandom", urandom)


def probabilities(std: float, most: int) -> NDArray[np.float64]:
    """That a Gaussian rounds to each of -most to most, the ends with their tails."""
    edges = np.arange(-most, most) + 0.5
    return np.diff(stats.norm.cdf(edges, scale=std), prepend=0, append=1)


@pytest.mark.parametrize("std", [0.3, 1.7, 6.0])
def test_values_have_the_probabilities_of_a_rounded_gaussian(std: float) -> None:
    count, most = 200_000, round(3 * std) + 1
    values = np.clip(rounded_gaussian(count, std), -most, most).astype(int)
    seen = np.bincount(values + most, minlength=2 * most + 1)

    assert stats.chisquare(seen, count * probabilities(std, most)).pvalue > 1e-6
    # The test has power: three per cent more noise, or less, is seen.
    for other in (std * 1.03, std / 1.03):
        wrong = count * probabilities(other, most)
        assert stats.chisquare(seen, wrong).pvalue < 1e-12


def test_on_a_fine_grid_values_are_gaussian_with_the_standard_deviation() -> None:
    values = rounded_gaussian(200_000, GRID_STD, num_threads=2)

    np.testing.assert_array_equal(values, np.rint(values))
    assert stats.kstest(values / GRID_STD, "norm").pvalue > 1e-6
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(values / (factor * GRID_STD), "norm").pvalue < 1e-100
    neighbours = np.corrcoef(values[1:], values[:-1])[0, 1]
    assert abs(neighbours) < 6 / np.sqrt(200_000)
    assert len(np.unique(values)) > 199_000  # all bits of the grid are used
    assert abs(np.mean(values % 2) - 0.5) < 6 * 0.5 / np.sqrt(200_000)


def exact(place: int, num_bits: int, std: float) -> set[int]:
    """What the two ends of an interval round to, by the inverse in 80 digits."""
    with mpmath.workdps(80):
        ends = []
        for one in (place, place + 1):
            tail = mpmath.mpf(one) / mpmath.mpf(2) ** num_bits
            start = -mpmath.mpf(float(ndtri(float(tail)))) if 2 * tail < 1 else 0
            normal = mpmath.findroot(
                lambda x, tail=tail: mpmath.erfc(x / mpmath.sqrt(2)) / 2 - tail,
                start,
                tol=1e-70,
            )
            ends.append(int(mpmath.floor(std * abs(normal) + mpmath.mpf(0.5))))
        return {*ends}


@pytest.mark.parametrize("std", [0.8, 300.0, GRID_STD])
def test_every_sure_draw_is_rounded_as_in_80_digits(std: float) -> None:
    places = np.random.default_rng(1).integers(2**63, size=40, dtype=np.uint64)
    places = np.concatenate([places, places >> np.uint64(20)])  # and tails
    whole, is_sure = magnitudes(places, std)

    assert is_sure.mean() > 0.95
    for place, value in zip(places[is_sure].tolist(), whole[is_sure], strict=True):
        assert exact(place, 64, std) == {int(value)}


def boundary(number: int, std: float) -> int:
    """The place of 64 bits whose interval holds where rounding turns."""
    with mpmath.workdps(60):
        tail = mpmath.erfc((number + mpmath.mpf(0.5)) / std / mpmath.sqrt(2)) / 2
        return int(mpmath.floor(tail * mpmath.mpf(2) ** 64))


@pytest.mark.parametrize("std", [0.8, 300.0, GRID_STD])
def test_draws_at_a_turn_of_rounding_get_more_bits_and_are_right(
    monkeypatch: pytest.MonkeyPatch, std: float
) -> None:
    numbers = [0, 1, 2, round(std), round(4 * std)]
    for number in numbers:
        place = boundary(number, std)
        _, is_sure = magnitudes(np.array([place], np.uint64), std)
        assert not is_sure[0]
        for further in (0, 2**63, 2**64 - 1):
            give_words(monkeypatch, [further])
            value = module._exact_magnitude(place, std)
            ends = exact(place << 64 | further, 128, std)
            assert ends == {value}
            assert value in (number, number + 1)
        give_words(monkeypatch, [0])
        high = module._exact_magnitude(place, std)
        give_words(monkeypatch, [2**64 - 1])
        low = module._exact_magnitude(place, std)
        assert (low, high) == (number, number + 1)  # the interval was split


def test_the_farthest_tail_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    give_words(monkeypatch, [1, 0, 0, 0, 1])  # place 0, and then zeros for 128 bits
    value = module._exact_magnitude(0, 1000.0)

    assert value > 13_000  # 13 standard deviations; 64 bits alone reach 9.1


def test_an_unsure_draw_of_many_keeps_its_sign_and_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turn = boundary(7, 300.0)
    words = [10 << 40 | 1, turn << 1 | 1, turn << 1, 5 << 50, 0, 2**64 - 1]
    give_words(monkeypatch, words)
    values = rounded_gaussian(4, 300.0)

    assert values.tolist()[1:3] == [-8, 7]  # more bits: none set, then all
    assert values[0] < 0 < values[3]


def test_ndtri_is_nearer_than_the_error_that_is_allowed_for() -> None:
    rng = np.random.default_rng(3)
    tails = np.concatenate([rng.random(300) / 2, 2.0 ** rng.uniform(-44, -1, 300)])
    errors = []
    with mpmath.workprec(120):
        for tail, normal in zip(tails.tolist(), ndtri(tails).tolist(), strict=True):
            excess = mpmath.ncdf(normal) - tail
            errors.append(float(abs(excess / mpmath.npdf(normal) / normal)))

    assert max(errors) < module._NDTRI_ERROR / 16
    assert max(errors) > 2**-54  # the comparison is finer than float64


def test_draws_are_never_repeated() -> None:
    first, second = (rounded_gaussian(1_000, GRID_STD) for _ in range(2))

    assert not (first == second).any()


@pytest.mark.parametrize("count", [0, 1, 65_535, 65_536, 65_537])
def test_as_many_are_drawn_as_are_asked_for(count: int) -> None:
    assert rounded_gaussian(count, 3.0, num_threads=2).shape == (count,)


def test_no_noise_is_zero_and_too_much_is_refused() -> None:
    assert rounded_gaussian(3, 0.0).tolist() == [0, 0, 0]
    for std in (-1.0, float("nan"), 2.0**47):
        told = rf"std={std}: must be in \[0, 2\*\*46\]; take a coarser grid"
        with pytest.raises(ValueError, match=told):
            rounded_gaussian(3, std)
