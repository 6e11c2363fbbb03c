"""Bounds from trials of Gaussian mechanisms, whose epsilon has a closed form."""

import numpy as np
import pytest
from scipy import stats

from dpsgd.privacy import Trials
from dpsgd.privacy.bounds import gaussian_epsilon
from dpsgd.privacy.trials import rate_bounds

STATED = {"delta": 1e-5, "confidence": 0.95}


def gaussian_trials(sigma: float, num_trials: int, seed: int = 0) -> Trials:
    rng = np.random.default_rng(seed)
    return Trials(
        with_canary=rng.normal(1.0, sigma, num_trials),
        without=rng.normal(0.0, sigma, num_trials),
    )


@pytest.mark.parametrize("successes", [0, 1, 7, 39, 40])
def test_rate_bounds_are_those_of_the_exact_test(successes: int) -> None:
    exact = stats.binomtest(successes, 40).proportion_ci(0.9, method="exact")

    assert rate_bounds(successes, 40, error=0.05) == pytest.approx(
        (exact.low, exact.high)
    )


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_neither_bound_passes_the_truth_more_often_than_it_may(sigma: float) -> None:
    truth = gaussian_epsilon(1 / sigma, 1e-5)
    trials = [gaussian_trials(sigma, 400, seed) for seed in range(60)]

    # 5 % are allowed; were they reached, more than 7 of 60 would come in 1 % of cases.
    for bounds in (
        [one.epsilon_lower_bound(**STATED) for one in trials],
        [one.epsilon_if_gaussian(**STATED) for one in trials],
    ):
        assert sum(bound > truth for bound in bounds) <= 7


def test_the_gaussian_bound_shows_most_of_epsilon() -> None:
    trials = gaussian_trials(1.0, 4_000)
    truth = gaussian_epsilon(1.0, 1e-5)

    assert 0.6 * truth < trials.epsilon_if_gaussian(**STATED) < truth
    # Without the assumption, 2,000 trials of each kind cannot see events of 1e-5.
    assert 0.2 * truth < trials.epsilon_lower_bound(**STATED) < 0.6 * truth


def test_trials_that_do_not_differ_show_nothing() -> None:
    same = np.zeros(100)
    trials = Trials(with_canary=same, without=same)

    assert trials.epsilon_lower_bound(**STATED) == 0.0
    assert trials.epsilon_if_gaussian(**STATED) == 0.0


def test_trials_without_noise_show_what_their_number_can() -> None:
    trials = Trials(with_canary=np.ones(200), without=np.zeros(200))
    lower, upper = rate_bounds(0, 100, error=0.025)

    assert lower == 0.0
    expected = np.log((1 - upper - 1e-5) / upper)
    assert trials.epsilon_lower_bound(**STATED) == pytest.approx(expected)


def test_a_single_trial_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trials=1: half of the trials choose"):
        Trials(with_canary=np.ones(5), without=np.ones(1))
