import math

import numpy as np
import pytest
from scipy.fft import irfft, rfft

from dpsgd.privacy import Phase, PLDAccountant, estimate_delta, estimate_epsilon
from dpsgd.privacy.bounds import (
    DIRECTIONS,
    Composition,
    MeshError,
    gaussian_epsilon,
    log_moments,
    mean_loss,
)
from dpsgd.privacy.estimator import contour_epsilon
from dpsgd.privacy.lattice import lattice_delta, lattice_epsilon
from dpsgd.privacy.losses import StepLoss

CIFAR = 4096 / 50000
TAIL = 1e-40  # leaves nothing out that a double could hold


def composed(*phases):
    return Composition.of(phases)


# Contour integrals of each direction, which agree with closed forms to 1e-9; those at
# a tiny rate are the brackets of dp-accounting's PLD, to the digits shown.
@pytest.mark.parametrize(
    ("phase", "delta", "direction", "epsilon"),
    [
        (Phase(CIFAR, 3.0, 2468), 1e-5, "remove", 6.529280),
        (Phase(CIFAR, 3.0, 2468), 1e-5, "add", 6.302998),
        (Phase(0.01, 1.0, 1000), 1e-5, "remove", 1.828237),
        (Phase(0.01, 1.0, 1000), 1e-5, "add", 1.416662),
        (Phase(0.01, 1.0, 1000), 1e-10, "remove", 3.290444),
        (Phase(0.01, 0.5, 100), 1e-5, "remove", 6.476210),
        (Phase(0.5, 0.3, 10), 1e-10, "remove", 102.764516),
    ],
)
def test_the_bound_is_just_above_the_reference_figures(
    phase, delta, direction, epsilon
):
    bound = lattice_epsilon(composed(phase), delta, direction)
    assert epsilon - 1e-6 <= bound <= epsilon * (1 + 5e-5)


# Another program's convolutions in 80-bit floats, of meshes of 2^20 and 2^21 nodes,
# extrapolated. They find 3.290444 and 1.828237 above, too. Where 64 bits resolve little
# of delta the allowance for rounding is what a bound costs.
@pytest.mark.parametrize(
    ("phase", "delta", "epsilon", "excess"),
    [
        (Phase(1e-6, 1.0, 1000), 1e-5, 1.57174e-5, 2e-4),
        (Phase(1e-5, 1.0, 1000), 1e-5, 7.01832e-4, 2e-4),
        (Phase(1e-4, 0.5, 10**4), 1e-10, 5.08436, 2e-4),
        (Phase(1e-4, 0.7, 1000), 1e-10, 0.686837, 2e-4),
        (Phase(1e-6, 0.7, 10**4), 1e-10, 5.62551e-3, 7e-3),
        (Phase(1e-5, 0.7, 10**4), 1e-10, 0.0942955, 7e-3),
    ],
)
def test_a_tiny_rate_is_never_understated_and_the_estimate_is_looser_there(
    phase, delta, epsilon, excess
):
    digits = 2e-6  # six figures are given
    bound = PLDAccountant().epsilon([phase], delta).upper
    assert epsilon * (1 - digits) <= bound <= epsilon * (1 + excess)
    assert contour_epsilon([phase], delta) is None
    estimate = estimate_epsilon([phase], delta)
    assert bound <= estimate <= epsilon * (1 + max(3e-4, excess))


def test_phases_of_different_rate_and_noise_compose_with_full_batches():
    run = composed(Phase(CIFAR, 4.0, 800), Phase(CIFAR / 2, 2.0, 600))
    assert 3.422937 <= lattice_epsilon(run, 1e-5, "remove") <= 3.4231
    mixed = [Phase(0.2, 5.0, 50), Phase(1.0, 10.0, 4)]
    exact = estimate_epsilon(mixed, 1e-5)
    bound = max(lattice_epsilon(composed(*mixed), 1e-5, d) for d in DIRECTIONS)
    assert exact * (1 - 1e-7) <= bound <= exact * (1 + 5e-5)


@pytest.mark.parametrize(("mu", "delta"), [(0.1, 1e-5), (1.0, 1e-12), (30.0, 1e-6)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_full_batches_come_out_as_the_gaussian_mechanism(mu, delta, direction):
    exact = gaussian_epsilon(mu, delta)
    bound = lattice_epsilon(composed(Phase(1.0, 1 / mu, 1)), delta, direction)
    assert exact * (1 - 1e-9) <= bound <= exact * (1 + 5e-5)


# One step has a closed form for delta; epsilons from those of removal at 1e-5.
@pytest.mark.parametrize(
    ("q", "sigma", "epsilon"),
    [(1e-6, 0.3, 0.5), (1e-4, 1.0, 0.0131), (0.01, 1.0, 0.19945), (0.4, 1.2, 1.5)],
)
def test_one_step_has_the_delta_of_its_closed_form(q, sigma, epsilon):
    exact = estimate_delta([Phase(q, sigma, 1)], epsilon)
    run = composed(Phase(q, sigma, 1))
    bound = max(lattice_delta(run, epsilon, d) for d in DIRECTIONS)
    assert exact * (1 - 1e-7) <= bound <= exact * (1 + 2e-3)


def test_random_settings_are_never_below_the_contour_integral():
    generator = np.random.default_rng(5)
    for _ in range(12):
        q, sigma = 10 ** generator.uniform(-2, 0), 10 ** generator.uniform(-0.3, 1.5)
        steps = int(10 ** generator.uniform(1, 4))
        delta = 10 ** generator.uniform(-10, -5)
        exact = estimate_epsilon([Phase(q, sigma, steps)], delta)
        if not exact:  # no contour, or nothing is revealed
            continue
        run = composed(Phase(q, sigma, steps))
        bound = max(lattice_epsilon(run, delta, d, tolerance=1e-3) for d in DIRECTIONS)
        assert exact * (1 - 1e-7) <= bound <= exact * (1 + 2e-3), (q, sigma, steps)


@pytest.mark.parametrize("phase", [Phase(0.5, 1.0, 10**7), Phase(0.01, 1.0, 10**8)])
def test_what_no_number_holds_has_a_bound_all_the_same(phase):
    bound = lattice_epsilon(composed(phase), 1e-5, "remove")
    assert bound >= phase.num_steps * mean_loss(phase)


def test_epsilon_and_delta_are_inverse():
    run = composed(Phase(0.01, 0.3, 100))
    epsilon = lattice_epsilon(run, 1e-10, "remove")
    # An error of 1e-4 in an epsilon of 49 is one of 5e-3 in delta.
    assert lattice_delta(run, epsilon, "remove") == pytest.approx(1e-10, rel=1e-2)


def test_refinement_stops_when_the_bound_is_low_enough():
    run = composed(Phase(CIFAR, 3.0, 2468))
    exact = 6.529280
    rough = lattice_epsilon(run, 1e-5, "remove", enough=6.6)
    assert 1.0005 * exact < rough <= 6.6
    assert lattice_epsilon(run, 1e-5, "remove", enough=100.0) > rough


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("q", "sigma"), [(1e-5, 0.6), (0.1, 2.0), (0.999, 0.4)])
def test_a_split_step_keeps_both_masses_and_reveals_no_less(q, sigma, direction):
    phase = Phase(q, sigma, 1)
    step = StepLoss.of(phase, direction, TAIL)
    width = float(np.ptp(step.losses)) / 500
    first, masses = step.on_lattice(width, -(10**6))
    losses = width * (first + np.arange(masses.size))
    # Of either distribution 1 is kept, but for the tails and rounding.
    assert masses.min() >= 0
    assert masses.sum() == pytest.approx(1.0, abs=1e-12)
    assert masses @ np.exp(-losses) == pytest.approx(1.0, abs=1e-12)
    for order in (0.5, 1.0, 2.0):
        exact = log_moments(composed(phase), np.array([order + 0j]), direction)
        on_lattice = math.log(masses @ np.exp(order * losses))
        assert exact[0].real - 1e-12 <= on_lattice
        assert step.log_moment(order) == pytest.approx(exact[0].real, abs=1e-12)


def test_losses_have_the_mean_of_a_fine_quadrature():
    step = StepLoss.of(Phase(0.05, 0.8, 1), "remove", TAIL)
    assert step.masses @ step.losses == pytest.approx(
        mean_loss(Phase(0.05, 0.8, 1)), rel=1e-10
    )


def test_losses_below_the_lowest_node_move_up_to_it():
    step = StepLoss.of(Phase(0.3, 0.3, 1), "add", TAIL)
    assert step.losses.min() < -1.0
    first, masses = step.on_lattice(0.01, -100)
    assert first == -100
    assert masses.sum() == pytest.approx(1.0, abs=1e-12)
    # Quadrature points know where a panel ends to 1 %, which is about a node.
    assert masses[0] > 0.98 * step.masses[step.losses < -1.0].sum()


def test_the_allowance_for_rounding_covers_the_error_of_the_transform():
    nodes, doublings = 1 << 11, 10
    masses = np.zeros(nodes)
    losses = StepLoss.of(Phase(0.01, 1.0, 1), "remove", 1e-18)
    first, step = losses.on_lattice(0.02, -nodes)
    masses[(first + np.arange(step.size)) % nodes] = step / step.sum()
    exact = masses
    for _ in range(doublings):  # sums of positive terms lose one rounding each
        full = np.convolve(exact, exact)
        exact = full[:nodes] + np.append(full[nodes:], 0.0)
    found = irfft(rfft(masses) ** (1 << doublings), nodes)
    allowed = 8 * math.log2(nodes) * 2.0**-53 * (2**doublings + 2)
    assert 0 < np.linalg.norm(found - exact) < allowed


def test_tiny_noise_is_refused():
    with pytest.raises(MeshError):
        lattice_epsilon(composed(Phase(0.1, 1e-3, 5)), 1e-5, "remove")
