"""Each statistic that accepts our sampler must reject a wrong one by a wide margin."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scores import (
    adjacency_score,
    marginal_score,
    mean_size_score,
    pairwise_score,
    size_variance_score,
    step_score,
)

from dpsgd.data.sampling import Microbatch, PoissonSampler, microbatches
from dpsgd.errors import ConfigError, DataError
from dpsgd.rng import RandomStreams

NUM_ROWS = 60
RATE = 0.1
NUM_STEPS = 20_000
STREAMS = RandomStreams.from_seed(0)

# The probability that a correct sampler fails is 6e-5 a statistic; the seed is fixed,
# so a test that passes stays so. A wrong sampler must lie twice as far out.
ACCEPTED = 4.0
REJECTED = 8.0

Inclusion = NDArray[np.bool_]


def sampler(num_rows: int, rate: float, seed: int = 0) -> PoissonSampler:
    streams = RandomStreams.from_seed(seed)
    return PoissonSampler(num_rows=num_rows, sample_rate=rate, streams=streams)


@pytest.fixture(scope="module")
def ours() -> Inclusion:
    included = np.zeros((NUM_STEPS, NUM_ROWS), bool)
    poisson = sampler(NUM_ROWS, RATE)
    for step in range(NUM_STEPS):
        included[step, poisson.draw(step)] = True
    return included


def coins(rate: float) -> Inclusion:
    return np.random.default_rng(1).random((NUM_STEPS, NUM_ROWS)) < rate


def shuffled_fixed_size() -> Inclusion:
    """Epochs of shuffled batches, each of exactly the expected size."""
    rng = np.random.default_rng(2)
    size = round(RATE * NUM_ROWS)
    steps = NUM_ROWS // size
    included = np.zeros((NUM_STEPS, NUM_ROWS), bool)
    for start in range(0, NUM_STEPS, steps):
        order = rng.permutation(NUM_ROWS).reshape(steps, size)
        for offset, batch in enumerate(order):
            included[start + offset, batch] = True
    return included


def without_neighbours() -> Inclusion:
    """Gaps of at least two: what a skip that starts one too late would give."""
    included = coins(RATE)
    included[:, 1:] &= ~included[:, :-1]
    return included


def test_every_row_is_drawn_at_the_sample_rate(ours: Inclusion) -> None:
    assert abs(marginal_score(ours, RATE)) < ACCEPTED
    assert marginal_score(coins(1.1 * RATE), RATE) > REJECTED


def test_rows_are_pairwise_independent(ours: Inclusion) -> None:
    assert abs(pairwise_score(ours, RATE)) < ACCEPTED
    assert pairwise_score(shuffled_fixed_size(), RATE) > REJECTED


def test_neighbouring_rows_are_independent(ours: Inclusion) -> None:
    assert abs(adjacency_score(ours, RATE)) < ACCEPTED
    assert adjacency_score(without_neighbours(), RATE) < -REJECTED


def test_steps_are_independent(ours: Inclusion) -> None:
    assert abs(step_score(ours, RATE)) < ACCEPTED
    assert step_score(shuffled_fixed_size(), RATE) < -REJECTED


def test_size_of_a_draw_has_the_mean_of_a_binomial(ours: Inclusion) -> None:
    assert abs(mean_size_score(ours, RATE)) < ACCEPTED
    assert mean_size_score(coins(1.1 * RATE), RATE) > REJECTED


def test_size_of_a_draw_has_the_variance_of_a_binomial(ours: Inclusion) -> None:
    assert abs(size_variance_score(ours, RATE)) < ACCEPTED
    assert size_variance_score(shuffled_fixed_size(), RATE) < -REJECTED


def test_sizes_follow_the_binomial_distribution(ours: Inclusion) -> None:
    edges = np.arange(1, 13)

    def p_value(included: Inclusion) -> float:
        cells = np.digitize(included.sum(1), edges)
        observed = np.bincount(cells, minlength=len(edges) + 1)
        below = stats.binom.cdf(edges - 1, NUM_ROWS, RATE)
        expected = np.diff(np.concatenate([[0], below, [1]])) * NUM_STEPS
        return float(stats.chisquare(observed, expected).pvalue)

    assert p_value(ours) > 1e-4
    assert p_value(coins(1.1 * RATE)) < 1e-12
    assert p_value(shuffled_fixed_size()) < 1e-12


@pytest.mark.parametrize("rate", [0.35, 0.9, 0.999])
def test_large_sample_rates_are_kept(rate: float) -> None:
    num_rows, num_steps = 5_000, 400
    poisson = sampler(num_rows, rate)
    drawn = sum(len(poisson.draw(step)) for step in range(num_steps))
    coins_tossed = num_rows * num_steps
    spread = np.sqrt(coins_tossed * rate * (1 - rate))

    assert abs(drawn - coins_tossed * rate) < ACCEPTED * spread
    # A fifth more or fewer rows left out would be noticed.
    assert 0.2 * coins_tossed * (1 - rate) > REJECTED * spread


def test_a_tiny_sample_rate_is_kept_where_float32_coins_are_19_percent_off() -> None:
    rate, num_rows, num_steps = 1e-7, 10**8, 2_000
    poisson = sampler(num_rows, rate)
    draws = [poisson.draw(step) for step in range(num_steps)]
    drawn = sum(len(draw) for draw in draws)
    expected = rate * num_rows * num_steps
    spread = np.sqrt(expected)

    assert abs(drawn - expected) < ACCEPTED * spread
    assert 0.19 * expected > 3 * REJECTED * spread
    positions = np.concatenate(draws) / num_rows
    assert stats.kstest(positions, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("rate", [1e-12, 1e-300, 5e-324])
def test_gaps_beyond_the_integers_leave_the_draw_empty(rate: float) -> None:
    poisson = sampler(1_000, rate)

    for step in range(200):
        draw = poisson.draw(step)
        assert draw.dtype == np.int64
        assert draw.shape == (0,)


@pytest.mark.parametrize("num_rows", [0, 1, 1_023, 1_024, 1_025, 5_000])
def test_sample_rate_one_draws_every_row(num_rows: int) -> None:
    draw = sampler(num_rows, 1.0).draw(3)

    np.testing.assert_array_equal(draw, np.arange(num_rows))


def test_no_rows_give_an_empty_draw() -> None:
    assert sampler(0, 0.5).draw(0).shape == (0,)


def test_a_draw_is_sorted_and_within_the_rows() -> None:
    draw = sampler(10_000, 0.4).draw(0)

    assert (np.diff(draw) > 0).all()
    assert draw[0] >= 0
    assert draw[-1] < 10_000


def test_same_key_and_step_give_the_same_draw() -> None:
    first, second = sampler(5_000, 0.3), sampler(5_000, 0.3)
    second.draw(11)

    np.testing.assert_array_equal(first.draw(7), second.draw(7))


def test_steps_and_keys_give_different_draws() -> None:
    draw = sampler(5_000, 0.3).draw(7)

    assert not np.array_equal(draw, sampler(5_000, 0.3).draw(8))
    assert not np.array_equal(draw, sampler(5_000, 0.3, seed=1).draw(7))


@pytest.mark.parametrize(("num_rows", "rate"), [(60, 0.1), (1_500, 0.7), (9_999, 0.5)])
def test_appending_a_row_leaves_the_inclusion_of_the_others(
    num_rows: int, rate: float
) -> None:
    fewer, more = sampler(num_rows, rate), sampler(num_rows + 1, rate)
    added = 0
    for step in range(200):
        draw = more.draw(step)
        np.testing.assert_array_equal(fewer.draw(step), draw[draw < num_rows])
        added += int(num_rows in draw)

    # Both cases of the added row occurred, at its rate.
    assert abs(added - 200 * rate) < ACCEPTED * np.sqrt(200 * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_sample_rate_outside_zero_to_one_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"sample_rate=.*: must be in \(0, 1\]; set"):
        sampler(10, rate)


@pytest.mark.parametrize("num_rows", [-1, 2**60])
def test_number_of_rows_out_of_range_is_refused(num_rows: int) -> None:
    with pytest.raises(DataError, match=rf"num_rows={num_rows}: .*; hold fewer rows"):
        sampler(num_rows, 0.5)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 100])
def test_microbatches_hold_each_row_once_and_have_one_size(size: int) -> None:
    draw = np.array([3, 5, 8, 13, 21, 34])
    parts = list(microbatches(draw, size))

    assert len(parts) == -(-len(draw) // size)
    assert all(part.rows.shape == part.mask.shape == (size,) for part in parts)
    assert [part.start for part in parts] == list(range(0, len(draw), size))
    held = np.concatenate([part.rows[part.mask] for part in parts])
    np.testing.assert_array_equal(held, draw)


def test_padding_repeats_row_zero_with_a_false_mask() -> None:
    (part,) = microbatches(np.array([4, 6]), 4)

    assert isinstance(part, Microbatch)
    np.testing.assert_array_equal(part.rows, [4, 6, 0, 0])
    np.testing.assert_array_equal(part.mask, [True, True, False, False])


@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [(1, [3]), (3, [3]), (4, [5]), (5, [5]), (6, [5, 3]), (9, [5, 5]), (13, [5, 5, 3])],
)
def test_the_last_part_is_no_longer_than_it_must_be(
    num_rows: int, sizes: list[int]
) -> None:
    draw = np.arange(1, num_rows + 1)
    parts = list(microbatches(draw, 5, padded_to=3))

    assert [len(part.rows) for part in parts] == sizes
    assert [len(part.mask) for part in parts] == sizes
    assert [part.start for part in parts] == list(range(0, num_rows, 5))
    held = np.concatenate([part.rows[part.mask] for part in parts])
    np.testing.assert_array_equal(held, draw)
    assert not any(part.rows[~part.mask].any() for part in parts)


def test_an_empty_draw_has_no_microbatch() -> None:
    assert list(microbatches(np.empty(0, np.int64), 4)) == []


def test_microbatch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.microbatch_size=0: must be"):
        list(microbatches(np.array([1]), 0))
