import math

import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy import (
    Accountant,
    Phase,
    PRVAccountant,
    calibrate_noise_multiplier,
    calibrate_num_steps,
    calibration,
)

CIFAR = 4096 / 50000
PRV = PRVAccountant()


def upper(q, sigma, steps, delta):
    return PRV.epsilon([Phase(q, sigma, steps)], delta).upper


def noise(target, q, steps, delta=1e-5):
    return calibrate_noise_multiplier(
        target_epsilon=target,
        sample_rate=q,
        num_steps=steps,
        delta=delta,
        accountant=PRV,
    )


def steps_within(target, q, sigma, delta=1e-5):
    return calibrate_num_steps(
        target_epsilon=target,
        sample_rate=q,
        noise_multiplier=sigma,
        delta=delta,
        accountant=PRV,
    )


# The exact noise multiplier: see test_estimator.
def test_calibrated_noise_is_certified_and_within_0_3_percent():
    sigma = noise(8, CIFAR, 2468)
    assert 2.560747 <= sigma <= 1.003 * 2.560747
    assert upper(CIFAR, sigma, 2468, 1e-5) <= 8


@pytest.mark.usefixtures("coarse")
def test_noise_without_an_estimate_is_certified_and_tight(monkeypatch):
    monkeypatch.setattr(calibration, "estimate_delta", lambda *_: None)
    sigma = noise(1.0, 0.05, 60)
    assert 0.99 < upper(0.05, sigma, 60, 1e-5) <= 1.0


@pytest.mark.usefixtures("coarse")
def test_noise_for_two_steps_is_certified():
    sigma = noise(0.05, 0.05, 2)
    assert 0.97 * 0.05 <= upper(0.05, sigma, 2, 1e-5) <= 0.05


def test_noise_of_full_batches_is_the_analytic_one():
    # mu = 1 has epsilon 4.377178 at delta 1e-5; 9 steps of noise 3 are mu = 1.
    # The search moves in steps of 2e-6 of the target.
    assert 3.0 <= noise(4.377178096, 1.0, 9) <= 3.0 * (1 + 5e-6)


def test_no_steps_need_no_noise():
    assert noise(1.0, 0.1, 0) == 0.0


def test_noise_is_never_lower_than_the_floor_where_delta_allows_all():
    assert noise(1.0, 1e-8, 10) == 0.01


@pytest.mark.usefixtures("coarse")
def test_an_accountant_that_says_more_gets_more_noise():
    class Doubling(Accountant):
        name = "doubling"

        def epsilon(self, phases, delta):
            bound = PRV.epsilon(phases, delta)
            return type(bound)(0.0, bound.estimate, 2 * bound.upper)

        def epsilon_curve(self, **_):
            raise AssertionError

        def slack(self, phases, delta):
            return 0.0

    sigma = calibrate_noise_multiplier(
        target_epsilon=2.0,
        sample_rate=0.05,
        num_steps=60,
        delta=1e-5,
        accountant=Doubling(),
    )
    assert 2 * upper(0.05, sigma, 60, 1e-5) <= 2.0


@pytest.mark.usefixtures("coarse")
def test_the_steps_found_fit_and_one_more_does_not():
    steps = steps_within(1.0, 0.05, 2.0)
    assert steps > 10
    assert upper(0.05, 2.0, steps, 1e-5) <= 1.0 < upper(0.05, 2.0, steps + 1, 1e-5)


@pytest.mark.usefixtures("coarse")
def test_the_steps_found_are_close_to_the_exact_count():
    # The exact account allows 3477 steps at noise 3 and epsilon 8.
    assert 3477 * 0.98 <= steps_within(8.0, CIFAR, 3.0) <= 3477


@pytest.mark.usefixtures("coarse")
def test_no_steps_fit_a_target_below_one_step_or_without_noise():
    assert steps_within(0.5, 0.1, 0.3) == 0
    assert steps_within(0.5, 0.1, 0.0) == 0


def test_more_steps_than_anyone_takes_are_refused():
    with pytest.raises(
        ConfigError, match=r"^noise_multiplier=1000000.0: lets more than"
    ):
        steps_within(1.0, 0.01, 1e6)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_impossible_targets_are_refused(target):
    with pytest.raises(ConfigError, match=r"^target_epsilon=.*: must be above 0"):
        noise(target, 0.1, 10)
    with pytest.raises(ConfigError, match=r"^target_epsilon=.*: must be above 0"):
        steps_within(target, 0.1, 1.0)
