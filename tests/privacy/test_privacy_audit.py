"""Lower bounds against published figures, and against runs whose epsilon is known."""

import math

import numpy as np
import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy.audit import (
    AuditResult,
    Guesses,
    epsilon_if_gaussian,
    epsilon_lower_bound,
    examine,
    gaussian_mu,
    guess,
    guesses_to_make,
    p_value,
)
from dpsgd.privacy.bounds import gaussian_epsilon

STATED = {"delta": 1e-5, "confidence": 0.95}


def guesses(num_canaries: int, num_guesses: int, num_correct: int) -> Guesses:
    return Guesses(
        num_canaries=num_canaries, num_guesses=num_guesses, num_correct=num_correct
    )


@pytest.mark.parametrize(
    ("made", "delta", "published"),
    [
        # Steinke et al. 2023, appendix D and section 7, rounded or cut to 3 digits.
        ((1_000, 100, 75), 1e-4, 0.673),
        ((100_000, 1_510, 1_439), 1e-5, 2.675),
    ],
)
def test_bounds_are_the_published_ones(
    made: tuple[int, int, int], delta: float, published: float
) -> None:
    bound = epsilon_lower_bound(guesses(*made), delta=delta, confidence=0.95)

    assert bound == pytest.approx(published, abs=1e-3)


def test_without_delta_the_bound_is_that_of_randomised_response() -> None:
    """All of r right: accuracy^r = 0.05, and accuracy = e^eps / (1 + e^eps)."""
    accuracy = 0.05 ** (1 / 80)
    expected = math.log(accuracy / (1 - accuracy))
    bound = epsilon_lower_bound(guesses(80, 80, 80), delta=1e-12, confidence=0.95)

    assert bound == pytest.approx(expected, rel=1e-4)


def test_the_p_value_is_that_of_a_simulated_guesser() -> None:
    """Randomised response is the best that pure DP allows: the bound is its tail."""
    rng = np.random.default_rng(0)
    accuracy = math.exp(1.5) / (1 + math.exp(1.5))
    right = rng.binomial(40, accuracy, size=200_000)
    bound = p_value(guesses(40, 40, 36), epsilon=1.5, delta=1e-12)

    # 1 % of 200,000 simulations: a standard deviation of 2 % of it.
    assert bound == pytest.approx((right >= 36).mean(), rel=0.1)


def test_more_right_guesses_show_more_and_delta_less() -> None:
    bounds = [epsilon_lower_bound(guesses(500, 100, n), **STATED) for n in (60, 80, 99)]
    worse = epsilon_lower_bound(guesses(500, 100, 99), delta=1e-3, confidence=0.95)
    surer = epsilon_lower_bound(guesses(500, 100, 99), delta=1e-5, confidence=0.99)

    assert bounds == sorted(set(bounds))
    assert worse < bounds[-1]
    assert surer < bounds[-1]


@pytest.mark.parametrize("made", [(100, 0, 0), (100, 60, 30), (100, 60, 0)])
@pytest.mark.parametrize("bound", [epsilon_lower_bound, epsilon_if_gaussian])
def test_guesses_no_better_than_chance_show_nothing(bound, made) -> None:
    assert bound(guesses(*made), **STATED) == 0.0


def simulated(epsilon: float, num_canaries: int, num_runs: int) -> list[Guesses]:
    """How guesses come out in runs of the Gaussian mechanism that has an epsilon."""
    rng = np.random.default_rng(0)
    number = guesses_to_make(num_canaries, epsilon=epsilon, **STATED)
    is_in = rng.random((num_runs, num_canaries)) < 0.5
    scores = rng.normal(size=is_in.shape) + gaussian_mu(epsilon, 1e-5) * is_in
    return [
        guess(one, coins, num_guesses=number)
        for one, coins in zip(scores, is_in, strict=True)
    ]


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_neither_bound_passes_the_truth_more_often_than_it_may(epsilon: float) -> None:
    runs = simulated(epsilon, 200, 60)

    # 5 % are allowed; were they reached, more than 7 of 60 would come in 1 % of cases.
    for bound in (epsilon_lower_bound, epsilon_if_gaussian):
        assert sum(bound(made, **STATED) > epsilon for made in runs) <= 7


def test_bounds_show_a_good_part_of_a_known_epsilon() -> None:
    runs = simulated(8.0, 1_000, 9)

    assert np.median([epsilon_lower_bound(made, **STATED) for made in runs]) > 2.3
    assert np.median([epsilon_if_gaussian(made, **STATED) for made in runs]) > 4.0


def test_a_claim_that_is_half_the_truth_is_refuted() -> None:
    rng = np.random.default_rng(0)
    is_in = rng.random(1_000) < 0.5
    scores = rng.normal(size=1_000) + 2 * gaussian_mu(4.0, 1e-5) * is_in
    found = examine(scores, is_in, epsilon=4.0, **STATED)
    result = AuditResult(epsilon=4.0, num_steps=1, canaries={"a": found}, **STATED)

    assert result.is_refuted
    assert found.epsilon_lower_bound < 4.0 < found.epsilon_if_gaussian


def test_the_highest_scores_are_guessed_in_and_the_lowest_out() -> None:
    scores = np.array([5.0, -3.0, 0.1, 4.0, -9.0])
    is_in = np.array([True, True, False, True, False])

    assert guess(scores, is_in, num_guesses=4) == guesses(5, 4, 3)
    assert guess(scores, is_in, num_guesses=3) == guesses(5, 3, 3)
    assert guess(scores, is_in, num_guesses=0) == guesses(5, 0, 0)
    assert guess(scores, is_in, num_guesses=5) == guesses(5, 5, 3)


def test_the_better_canaries_are_told_the_fewer_are_guessed() -> None:
    """At a small epsilon only many guesses refute, at a large one a few sure ones."""
    numbers = [
        guesses_to_make(2_000, epsilon=epsilon, **STATED) for epsilon in (0.1, 2.0)
    ]

    assert numbers[0] > numbers[1] > 20
    assert guesses_to_make(31, epsilon=math.inf, **STATED) == 30
    assert all(number % 2 == 0 for number in numbers)


def test_mu_is_the_inverse_of_epsilon() -> None:
    for mu in (0.2, 1.0, 7.0):
        assert gaussian_mu(gaussian_epsilon(mu, 1e-5), 1e-5) == pytest.approx(mu)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match=r"confidence=.*: must be in \(0, 1\)"):
        epsilon_lower_bound(guesses(9, 9, 9), delta=1e-5, confidence=confidence)


@pytest.mark.parametrize("made", [(10, 11, 3), (10, 5, 6), (10, 5, -1)])
def test_counts_that_cannot_be_are_refused(made: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="num_correct <= num_guesses"):
        guesses(*made)
