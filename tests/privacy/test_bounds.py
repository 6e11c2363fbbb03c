import math

import numpy as np
import pytest
from scipy.special import comb
from scipy.stats import norm

from dpsgd.privacy import Phase
from dpsgd.privacy.bounds import (
    DIRECTIONS,
    Composition,
    gaussian_delta,
    gaussian_epsilon,
    log_moments,
    mean_loss,
    quick_epsilon,
    total_variation,
)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.7), (0.2, 1.0), (0.9, 5.0)])
@pytest.mark.parametrize("order", [1, 2, 7])
def test_moments_at_whole_orders_match_the_binomial_sum(q, sigma, order):
    # Mironov, Talwar and Zhang 2019, section 3.3: E[r^a] for integer a.
    alpha = order + 1
    exact = sum(
        comb(alpha, k) * (1 - q) ** (alpha - k) * q**k
        * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(alpha + 1)
    )  # fmt: skip
    found = log_moments(
        Composition.of([Phase(q, sigma, 3)]), np.array([order + 0j]), "remove"
    )
    assert found[0].real == pytest.approx(3 * math.log(exact), rel=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moments_at_complex_orders_match_a_plain_fine_quadrature(direction):
    q, sigma, order = 0.1, 1.3, 2.5 + 4.0j
    x = np.linspace(-25, 30, 400_001)
    ratio = 1 - q + q * np.exp((2 * x - 1) / (2 * sigma**2))
    power = order + 1 if direction == "remove" else -order
    mean = (ratio**power * norm.pdf(x, scale=sigma)).sum() * (x[1] - x[0])
    composition = Composition.of([Phase(q, sigma, 1)])
    found = np.exp(log_moments(composition, np.array([order]), direction)[0])
    assert abs(found / mean - 1) < 1e-10


def test_the_mean_loss_matches_a_plain_fine_quadrature():
    q, sigma = 0.05, 0.8
    x = np.linspace(-12, 14, 400_001)
    ratio = 1 - q + q * np.exp((2 * x - 1) / (2 * sigma**2))
    mean = (ratio * np.log(ratio) * norm.pdf(x, scale=sigma)).sum() * (x[1] - x[0])
    assert mean_loss(Phase(q, sigma, 9)) == pytest.approx(mean, rel=1e-10)
    assert mean_loss(Phase(1.0, 2.0, 1)) == 0.125


def test_the_gaussian_epsilon_is_the_published_one_and_inverts_delta():
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178, abs=1e-6)
    for mu in (0.01, 0.5, 3.0, 40.0):
        epsilon = gaussian_epsilon(mu, 1e-6)
        if epsilon > 0:
            assert gaussian_delta(mu, epsilon) == pytest.approx(1e-6, rel=1e-6)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_epsilon(1e140, 1e-5) > 1e279


def test_phases_merge_and_those_that_release_nothing_drop():
    composition = Composition.of(
        [Phase(0.1, 2.0, 3), Phase(0.1, 2.0, 4), Phase(0.0, 0.0, 9), Phase(1, 2.0, 16)]
    )
    assert composition.phases == (Phase(0.1, 2.0, 7),)
    assert composition.gaussian_mu == pytest.approx(2.0)
    assert Composition.of([Phase(0.5, 0.0, 0)]).unamplified_mu == 0.0
    assert Composition.of([Phase(0.5, 0.0, 1)]).gaussian_mu == math.inf


def test_total_variation_of_one_step_is_the_integral_of_the_difference():
    q, sigma = 0.3, 0.9
    x = np.linspace(-12, 14, 400_001)
    gap = q * np.abs(norm.pdf(x, 1, sigma) - norm.pdf(x, 0, sigma))
    exact = gap.sum() * (x[1] - x[0]) / 2
    found = total_variation(Composition.of([Phase(q, sigma, 1)]))
    assert found == pytest.approx(exact, rel=1e-6)


# "exact eps" of Gopi et al.'s and the contour method; see test_estimator.
@pytest.mark.parametrize(
    ("phase", "exact"),
    [
        (Phase(4096 / 50000, 3.0, 2468), 6.529280),
        (Phase(0.01, 1.0, 1), 0.199450),
        (Phase(0.01, 0.5, 100), 6.476210),
        (Phase(1.0, 1.0, 1), 4.377178),
    ],
)
def test_the_quick_epsilon_is_never_below_the_exact_one(phase, exact):
    assert quick_epsilon([phase], 1e-5) >= exact * (1 - 1e-6)


def test_the_quick_epsilon_of_tiny_noise_is_that_without_amplification():
    assert quick_epsilon([Phase(0.5, 1e-4, 4)], 1e-5) == pytest.approx(
        gaussian_epsilon(2e4, 1e-5), rel=1e-8
    )
