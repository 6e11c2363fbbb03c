import math
import time

import mpmath as mp
import numpy as np
import pytest
from scipy.stats import norm

from dpsgd.errors import ConfigError
from dpsgd.privacy import Phase, estimate_delta, estimate_epsilon

CIFAR = 4096 / 50000
IMAGENET = 16384 / 1281167

# Exact epsilons: contour integral agreeing with closed forms to 1e-9, with
# dp-accounting's PLD brackets and with prv-accountant; rounded to 6 decimals.
GOLDEN = [
    (CIFAR, 10.0, 875, 1e-5, 0.902760),
    (CIFAR, 6.0, 1125, 1e-5, 1.836396),
    (CIFAR, 3.0, 2468, 1e-5, 6.529280),
    (16384 / 50000, 21.1, 250, 1e-5, 0.912116),
    (IMAGENET, 2.5, 71589, 8e-7, 7.440152),
    (256 / 60000, 1.1, 14062, 1e-5, 2.381597),
    (0.01, 1.0, 1000, 1e-5, 1.828237),
    (1.0, 1.0, 1, 1e-5, 4.377178),
    (0.01, 1.0, 1, 1e-5, 0.199450),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "epsilon"), GOLDEN)
def test_estimates_match_the_reference_figures(q, sigma, steps, delta, epsilon):
    phases = [Phase(q, sigma, steps)]
    start = time.process_time()
    found = estimate_epsilon(phases, delta)
    assert time.process_time() - start < 0.5  # 0.01 s on a quiet core
    # Half a unit of the last digit given.
    assert found == pytest.approx(epsilon, abs=6e-7)
    assert estimate_delta(phases, found) == pytest.approx(delta, rel=1e-5)


# Noise multipliers at which a target is met exactly, by the same contour method.
@pytest.mark.parametrize(
    ("q", "steps", "epsilon", "delta", "sigma"),
    [
        (CIFAR, 875, 1, 1e-5, 9.119010),
        (CIFAR, 1125, 2, 1e-5, 5.567272),
        (CIFAR, 2468, 8, 1e-5, 2.560747),
        (IMAGENET, 71589, 8, 8e-7, 2.361754),
        (16 * IMAGENET, 3910, 8, 8e-7, 8.463980),
        (256 / 60000, 14062, 2, 1e-5, 1.224145),
    ],
)
def test_estimates_match_the_reference_noise(q, steps, epsilon, delta, sigma):
    # Six decimals of sigma leave about 1e-6 of epsilon.
    found = estimate_epsilon([Phase(q, sigma, steps)], delta)
    assert found == pytest.approx(epsilon, rel=2e-6)


def test_phases_of_different_noise_and_rate_compose():
    phases = [Phase(CIFAR, 4.0, 800), Phase(CIFAR / 2, 2.0, 600)]
    assert estimate_epsilon(phases, 1e-5) == pytest.approx(3.422938, abs=6e-7)
    assert estimate_epsilon(phases[::-1], 1e-5) == pytest.approx(3.422938, abs=6e-7)


def test_full_batches_add_to_a_subsampled_run_as_one_gaussian():
    run = [Phase(0.2, 5.0, 50)]
    split = [*run, Phase(1.0, 10.0, 2), Phase(1.0, 10.0, 2)]
    whole = [*run, Phase(1.0, 5.0, 1)]
    alone = estimate_epsilon(run, 1e-5)
    assert estimate_epsilon(split, 1e-5) == pytest.approx(
        estimate_epsilon(whole, 1e-5), rel=1e-7
    )
    assert estimate_epsilon(whole, 1e-5) > alone


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_one_step_matches_the_integral_of_the_densities_both_ways(epsilon):
    q, sigma = 0.4, 1.2
    x = np.linspace(-14, 16, 600_001)
    without = norm.pdf(x, 0, sigma)
    with_it = (1 - q) * without + q * norm.pdf(x, 1, sigma)
    deltas = [
        np.maximum(0, p - math.exp(epsilon) * r).sum() * (x[1] - x[0])
        for p, r in ((with_it, without), (without, with_it))
    ]
    found = estimate_delta([Phase(q, sigma, 1)], epsilon)
    assert found == pytest.approx(max(deltas), rel=1e-7)


def test_a_nearly_full_batch_matches_the_gaussian_mechanism():
    nearly = estimate_epsilon([Phase(1 - 1e-9, 2.0, 7)], 1e-5)
    assert nearly == pytest.approx(
        estimate_epsilon([Phase(1.0, 2.0, 7)], 1e-5), rel=1e-6
    )


# dp-accounting's pessimistic PLD, refined until its digits stand.
@pytest.mark.parametrize(
    ("phase", "delta", "epsilon"),
    [
        (Phase(1e-5, 0.7, 100), 1e-8, 0.0077264),
        (Phase(1e-4, 1.0, 100), 1e-10, 0.031833),
        (Phase(1e-3, 0.7, 1000), 1e-8, 1.90981),
        (Phase(0.01, 0.2, 10), 1e-5, 36.92760),
    ],
)
def test_where_no_contour_settles_the_lattice_stands_in(phase, delta, epsilon):
    found = estimate_epsilon([phase], delta)
    assert epsilon * (1 - 1e-5) <= found <= epsilon * (1 + 6e-4)
    assert estimate_delta([phase], found) == pytest.approx(delta, rel=2e-2)


def test_without_noise_to_speak_of_there_is_no_estimate():
    assert estimate_epsilon([Phase(0.01, 0.001, 10)], 1e-5) is None
    assert estimate_delta([Phase(0.01, 0.001, 10)], 1e5) is None


# The Gaussian mechanism's and one step's delta, in 40 digits.
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (1.0, 1.0, 1, 1e-5),
        (1.0, 30.0, 400, 1e-10),
        (0.01, 1.0, 1, 1e-5),
        (1e-4, 0.5, 1, 1e-8),
        (0.5, 5.0, 1, 1e-6),
    ],
)
def test_estimates_agree_with_closed_forms_to_1e_8(q, sigma, steps, delta):
    epsilon = estimate_epsilon([Phase(q, sigma, steps)], delta)
    with mp.workdps(40):
        mu = mp.sqrt(steps) / mp.mpf(sigma)
        ratio = mp.exp(epsilon)
        # P[x] > exp(epsilon) Q[x] from this x on, with noise of deviation 1 / mu.
        x = mp.log((ratio - 1 + mp.mpf(q)) / mp.mpf(q)) / mu**2 + mp.mpf(1) / 2
        with_it = q * mp.ncdf(-(x - 1) * mu) + (1 - q) * mp.ncdf(-x * mu)
        exact = with_it - ratio * mp.ncdf(-x * mu)
        slope = ratio * mp.ncdf(-x * mu)
    # An error of epsilon is one of delta times the slope, exp(epsilon) Q[x above].
    assert abs(exact - delta) / slope < 1e-8 * epsilon


def test_the_trivial_estimates_are_exact():
    assert estimate_epsilon([], 1e-5) == 0.0
    assert estimate_epsilon([Phase(0.1, 0.0, 0)], 1e-5) == 0.0
    assert estimate_epsilon([Phase(0.1, 0.0, 1)], 1e-5) == math.inf
    assert estimate_epsilon([Phase(1e-7, 1.0, 10)], 1e-5) == 0.0
    assert estimate_delta([Phase(0.1, 0.0, 1)], 1.0) == 1.0
    with pytest.raises(ConfigError, match="delta=2"):
        estimate_epsilon([Phase(0.1, 1.0, 1)], 2)
