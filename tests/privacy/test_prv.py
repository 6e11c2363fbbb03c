import math

import pytest

from dpsgd.errors import ConfigError
from dpsgd.privacy import (
    EpsilonBound,
    Phase,
    PRVAccountant,
    estimate_epsilon,
    prv,
)
from dpsgd.privacy.bounds import Composition, gaussian_epsilon
from dpsgd.privacy.certificate import Certificate, certify

CIFAR = 4096 / 50000
PRV = PRVAccountant()


@pytest.fixture(autouse=True)
def forgotten():
    """Lets no test see the answers of another, given at another precision."""
    PRV._answers.clear()


# The exact epsilons of test_estimator and, last, of settings beyond its reach.
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "epsilon", "width"),
    [
        (CIFAR, 3.0, 2468, 1e-5, 6.529280, 2e-3),
        (0.01, 1.0, 1, 1e-5, 0.199450, 3e-3),
        (0.01, 0.5, 100, 1e-5, 6.476210, 2e-3),
    ],
)
def test_certificates_enclose_the_reference_figures_tightly(
    q, sigma, steps, delta, epsilon, width
):
    bound = PRV.epsilon([Phase(q, sigma, steps)], delta)
    assert bound.lower <= epsilon <= bound.upper
    assert bound.upper <= epsilon * (1 + width)
    assert bound.lower >= epsilon * (1 - width)
    assert bound.estimate == pytest.approx(epsilon, abs=6e-7)


def test_tiny_rates_are_certified_without_an_estimate(monkeypatch):
    monkeypatch.setattr(prv, "_MAX_NODES", 300_000)
    bound = PRV.epsilon([Phase(1e-6, 0.5, 10**6)], 1e-8)
    assert bound.lower <= 0.296266 <= bound.upper < 0.6


@pytest.mark.usefixtures("coarse")
def test_phases_of_different_noise_are_certified_together():
    bound = PRV.epsilon([Phase(CIFAR, 4.0, 800), Phase(CIFAR / 2, 2.0, 600)], 1e-5)
    assert bound.lower <= 3.422938 <= bound.upper <= 3.422938 * 1.01


def test_full_batches_are_the_analytic_gaussian():
    bound = PRV.epsilon([Phase(1.0, 2.0, 4)], 1e-5)
    assert bound.estimate == pytest.approx(4.377178, abs=1e-6)
    assert bound.lower == pytest.approx(bound.upper, rel=1e-8)
    assert bound.lower <= gaussian_epsilon(1.0, 1e-5) <= bound.upper


def test_the_mean_that_the_package_gets_wrong_is_corrected():
    # prv-accountant 0.2.0 alone misses the exact 6.4762103 by 1.15 half widths here.
    composition = Composition.of([Phase(0.01, 0.5, 100)])
    certificate = certify(composition, 1e-5, eps_error=5e-3, max_nodes=10**6)
    alone = certificate.package.compute_epsilon(1e-5, [100])[1]
    corrected = certificate.bound([100]).estimate
    assert abs(alone - 6.4762103) > 1e-4
    assert abs(corrected - 6.4762103) < 1e-5


@pytest.mark.parametrize(
    ("phases", "epsilon"),
    [
        ([], 0.0),
        ([Phase(0.1, 1.0, 0)], 0.0),
        ([Phase(0.1, 0.0, 0)], 0.0),
        ([Phase(0.0, 0.0, 5)], 0.0),
        ([Phase(1e-8, 1.0, 5)], 0.0),
        ([Phase(0.1, 0.0, 5)], math.inf),
        ([Phase(0.1, 1e-200, 5)], math.inf),
        ([Phase(0.1, 5.0, 5), Phase(1.0, 0.0, 1)], math.inf),
    ],
)
def test_what_the_package_cannot_be_asked_is_answered_exactly(phases, epsilon):
    assert PRV.epsilon(phases, 1e-5) == EpsilonBound(epsilon, epsilon, epsilon)


@pytest.mark.parametrize("sigma", [1e-140, 1e-3, 0.05])
def test_tiny_noise_is_bounded_and_does_not_hang(sigma):
    bound = PRV.epsilon([Phase(0.01, sigma, 10)], 1e-5)
    unamplified = gaussian_epsilon(math.sqrt(10) / sigma, 1e-5)
    assert bound.lower <= bound.upper <= unamplified * (1 + 1e-8)
    # One step alone reveals this much less than log(1 / q) below a full batch.
    one_step = gaussian_epsilon(1 / sigma, 1e-5 / 0.01) + math.log(0.01)
    assert bound.upper >= one_step * (1 - 1e-6)


@pytest.mark.usefixtures("coarse")
def test_a_setting_on_which_the_package_fails_has_a_sound_bound():
    phases = [Phase(0.2, 1.0, 500)]
    assert (
        certify(Composition.of(phases), 1e-10, eps_error=0.5, max_nodes=10**6) is None
    )
    bound = PRV.epsilon(phases, 1e-10)
    exact = estimate_epsilon(phases, 1e-10)
    assert exact == pytest.approx(52.38871, abs=1e-4)
    assert bound.lower <= exact <= bound.upper <= 1.0002 * exact


def test_many_steps_are_sized_to_fit(monkeypatch):
    monkeypatch.setattr(prv, "_MAX_NODES", 200_000)
    phases = [Phase(0.01, 1.0, 10**6)]
    bound = PRV.epsilon(phases, 1e-5)
    assert bound.lower <= 139.0303 <= bound.upper <= 1.05 * 139.0303


def test_the_certificate_never_promises_less_than_the_estimate(monkeypatch):
    monkeypatch.setattr(prv, "contour_epsilon", lambda *_: 0.3)
    bound = PRV.epsilon([Phase(0.01, 1.0, 1)], 1e-5)
    assert bound.upper >= 0.3


def test_a_curve_bounds_each_count_and_never_falls():
    steps = [500, 0, 1, 120, 2468]
    curve = PRV.epsilon_curve(
        sample_rate=CIFAR, noise_multiplier=3.0, steps=steps, delta=1e-5
    )
    for count, bound in zip(steps, curve, strict=True):
        exact = estimate_epsilon([Phase(CIFAR, 3.0, count)], 1e-5)
        assert bound.lower <= exact <= bound.upper <= 1.02 * exact + 0.02
    uppers = [curve[index].upper for index in (1, 2, 3, 0, 4)]
    assert uppers == sorted(uppers)


def test_a_curve_without_noise_or_of_full_batches_needs_no_package():
    def uppers(q, sigma):
        curve = PRV.epsilon_curve(
            sample_rate=q, noise_multiplier=sigma, steps=[0, 4], delta=1e-5
        )
        return [bound.upper for bound in curve]

    assert uppers(0.1, 0.0) == [0.0, math.inf]
    assert uppers(1.0, 2.0) == pytest.approx([0.0, 4.377178], abs=1e-6)


@pytest.mark.usefixtures("coarse")
def test_the_addition_of_an_example_is_certified_though_the_package_is_silent(
    monkeypatch,
):
    monkeypatch.setattr(prv, "contour_epsilon", lambda *_: 0.5)
    monkeypatch.setattr(Certificate, "bound", lambda *_: EpsilonBound(0.0, 0.1, 0.1))
    # 1.416662 is the epsilon of adding alone.
    assert 1.416661 <= PRV.epsilon([Phase(0.01, 1.0, 1000)], 1e-5).upper <= 1.4168


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("contour", [1.828237, None])
def test_a_removal_that_the_package_understates_is_caught(monkeypatch, contour):
    monkeypatch.setattr(prv, "contour_epsilon", lambda *_: contour)
    monkeypatch.setattr(Certificate, "bound", lambda *_: EpsilonBound(0.0, 1.7, 1.7))
    upper = PRV.epsilon([Phase(0.01, 1.0, 1000)], 1e-5).upper
    assert 1.828236 <= upper <= 1.8285


@pytest.mark.parametrize("steps", [1, 10**4])
def test_epsilons_too_small_for_the_package_are_certified_all_the_same(
    monkeypatch, steps
):
    monkeypatch.setattr(prv, "certify", None)  # not asked, so not missed
    phases = [Phase(1e-4, 30.0, steps)]
    exact = estimate_epsilon(phases, 1e-10)
    assert exact <= PRV.epsilon(phases, 1e-10).upper <= 1.0005 * exact
    assert PRV.slack(phases, 1e-10) <= 2e-4 * exact


def test_a_delta_below_the_rounding_of_the_package_is_refused():
    with pytest.raises(ConfigError, match=r"^delta=1e-15: must be at least 1e-14"):
        PRV.epsilon([Phase(0.1, 1.0, 10)], 1e-15)
