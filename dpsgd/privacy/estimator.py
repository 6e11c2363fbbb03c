r"""Epsilon and delta to about nine digits where it can, in hundredths of a second.

The privacy loss L of a composition has moments M(s) = E[exp(s L)], the product of
those of its steps. Since, for every c > 0,

    max(0, 1 - exp(-x)) = 1 / (2 pi i) int_{c + iR} exp(s x) / (s (s + 1)) ds,

taking x = L - epsilon and the mean on both sides gives

    delta(epsilon) = 1 / (2 pi i) int_{c + iR} exp(-epsilon s) M(s) / (s (s + 1)) ds.

On a line near the saddle point little cancels, so that the trapezoid rule finds delta
to a small *relative* error. Every figure is computed on two lines with two meshes. If
they disagree, as with few steps at a small q, whose losses are so concentrated that M
hardly falls along the line, the bound of `lattice` stands in. It is too large, not too
small: of epsilon by 2e-5 to 3e-4, and by up to 7e-3 at q of 1e-5 and less, where its
allowance for rounding shows. It ends sooner than that of the accountant `pld`, so that
such an estimate may be above a certificate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from dpsgd.privacy.bounds import (
    DIRECTIONS,
    Composition,
    Direction,
    MeshError,
    gaussian_delta,
    gaussian_epsilon,
    log_moments,
    quick_epsilon,
    renyi_epsilon,
    renyi_log_delta,
    solved,
    total_variation,
)
from dpsgd.privacy.lattice import larger_epsilon, lattice_delta, lattice_epsilon
from dpsgd.privacy.mechanism import Phase, check_delta

__all__ = ["contour_epsilon", "estimate_delta", "estimate_epsilon", "likely_epsilon"]

_AGREEMENT: Final = 1e-7
_CANCELLATION: Final = 1e-10
_LOG_NEGLIGIBLE: Final = math.log(1e-13)
_MAX_NODES: Final = 4096
_FIRST_BLOCK: Final = 48
_WINDOWS: Final = (1.0, 2.0)
_TOLERANCE: Final = 1e-3


@dataclass(frozen=True)
class _Contour:
    """The integrand at the nodes c + i h k, k = 0, 1, ..., but for exp(-epsilon s)."""

    orders: NDArray[np.complex128]
    logs: NDArray[np.complex128]
    step: float

    def log_delta(self, epsilon: float) -> float:
        """Returns the logarithm of the trapezoid sum at an epsilon, or fails."""
        start, top = float(self.orders[0].real), float(self.logs[0].real)
        terms = np.exp(self.logs - top - epsilon * (self.orders - start)).real
        total = float(terms.sum() - terms[0] / 2)
        if not total > _CANCELLATION * float(np.abs(terms).sum()):
            raise MeshError("the integrand cancels on this contour")
        return top - epsilon * start + math.log(self.step / math.pi * total)


def estimate_delta(phases: Sequence[Phase], epsilon: float) -> float | None:
    """Estimates the smallest delta at an epsilon.

    Args:
        phases: Steps composed; phases may differ in all they have.
        epsilon: >= 0, finite.

    Returns:
        Delta in [0, 1], the larger of removing and adding an example, to a relative
        error of about 1e-7, or, where the contours disagree, a bound about 3e-3 too
        large, more at q of 1e-5 and less; 0 without steps, 1 without noise; None for
        noise_multiplier below 0.03.
    """
    composition = Composition.of(phases)
    if not composition.phases:
        return gaussian_delta(composition.gaussian_mu, epsilon)
    if math.isinf(composition.gaussian_mu):
        return 1.0
    if _is_one_step(composition):
        return max(_one_step_delta(composition, epsilon, d) for d in DIRECTIONS)
    largest = 0.0
    for direction in DIRECTIONS:
        bound, order = renyi_log_delta(composition, epsilon, direction)
        if math.exp(bound) <= largest:
            continue
        found = _delta_of(composition, epsilon, direction, bound, order)
        if found is None:
            try:
                found = lattice_delta(composition, epsilon, direction, enough=largest)
            except MeshError:
                return None
        largest = max(largest, found)
    return largest


def estimate_epsilon(phases: Sequence[Phase], delta: float) -> float | None:
    """Estimates the smallest epsilon at a delta.

    Args:
        phases: Steps composed; phases may differ in all they have.
        delta: In (0, 1).

    Returns:
        Epsilon >= 0, the larger of removing and adding an example, to a relative
        error of about 1e-7, or, where the contours disagree, a bound about 3e-4 too
        large, up to 7e-3 at q of 1e-5 and less; 0 without steps, inf without noise;
        None for noise_multiplier below 0.03.

    Raises:
        ConfigError: `delta` is out of range.

    >>> round(estimate_epsilon([Phase(4096 / 50000, 3.0, 2468)], 1e-5), 6)
    6.52928
    """
    found = contour_epsilon(phases, delta)
    if found is not None:
        return found
    bound = larger_epsilon(Composition.of(phases), delta, tolerance=_TOLERANCE)
    return None if math.isinf(bound) else bound


def contour_epsilon(phases: Sequence[Phase], delta: float) -> float | None:
    """Estimates the smallest epsilon by closed forms and contours alone.

    Args:
        phases: Steps composed; phases may differ in all they have.
        delta: In (0, 1).

    Returns:
        As `estimate_epsilon` to a relative error of about 1e-7, or None where the
        contours disagree.

    Raises:
        ConfigError: `delta` is out of range.
    """
    check_delta(delta)
    composition = Composition.of(phases)
    if not composition.phases or math.isinf(composition.gaussian_mu):
        return gaussian_epsilon(composition.gaussian_mu, delta)
    if total_variation(composition) <= delta:
        return 0.0
    if _is_one_step(composition):
        return _one_step_epsilon(composition, delta)
    largest = 0.0
    for direction in DIRECTIONS:
        bound, order = renyi_epsilon(composition, delta, direction)
        if bound <= largest:
            continue
        found = _epsilon_of(composition, delta, direction, bound, order)
        if found is not None:
            largest = max(largest, found)
        elif not _is_within(composition, delta, direction, largest):
            return None
    return largest


def _is_within(
    composition: Composition, delta: float, direction: Direction, epsilon: float
) -> bool:
    """Tells whether a direction surely spends at most an epsilon found for another."""
    if epsilon == 0:
        return False
    try:
        bound = lattice_epsilon(
            composition, delta, direction, tolerance=_TOLERANCE, enough=epsilon
        )
    except MeshError:
        return False
    return bound <= epsilon


def _is_one_step(composition: Composition) -> bool:
    """Tells whether the composition has the closed form of a single draw."""
    return composition.num_steps == 1 and composition.gaussian_mu == 0


def _one_step_delta(
    composition: Composition, epsilon: float, direction: Direction
) -> float:
    """Returns the delta of one step: a scaled one of N(1) against N(0)."""
    phase = composition.phases[0]
    q, mu = phase.sample_rate, 1 / phase.noise_multiplier
    if direction == "remove":
        # (1 - q) N(0) + q N(1) - e^epsilon N(0) = q (N(1) - e^inner N(0)).
        inner = epsilon + math.log1p(-(1 - q) * math.exp(-epsilon)) - math.log(q)
        return q * gaussian_delta(mu, inner)
    # N(0) - e^epsilon ((1 - q) N(0) + q N(1)) = share (N(0) - e^inner N(1)).
    if epsilon >= -math.log1p(-q):
        return 0.0
    share = -math.expm1(epsilon + math.log1p(-q))
    return share * gaussian_delta(mu, epsilon + math.log(q / share))


def _one_step_epsilon(composition: Composition, delta: float) -> float:
    """Returns the epsilon of one step, whose delta at 0 exceeds the one given."""
    top = gaussian_epsilon(composition.unamplified_mu, delta)

    def excess(epsilon: float) -> float:
        return max(_one_step_delta(composition, epsilon, d) for d in DIRECTIONS) - delta

    return math.inf if math.isinf(top) else solved(excess, top)


def _delta_of(
    composition: Composition,
    epsilon: float,
    direction: Direction,
    log_bound: float,
    order: float,
) -> float | None:
    """Returns the delta of one direction; None if two contours disagree."""

    def evaluate(contour: _Contour) -> float:
        return contour.log_delta(epsilon)

    found = _settled(composition, direction, order, log_bound, evaluate)
    return None if found is None else min(1.0, math.exp(found))


def _epsilon_of(
    composition: Composition,
    delta: float,
    direction: Direction,
    bound: float,
    order: float,
) -> float | None:
    """Returns the epsilon of one direction, in [0, bound]; None as `_delta_of`."""
    target = math.log(delta)

    def solve(contour: _Contour) -> float:
        def excess(epsilon: float) -> float:
            return contour.log_delta(epsilon) - target

        # Down from the bound, as far from the saddle point the sum would cancel.
        low, high, stride = bound, bound, 0.5 / order
        while low > 0:
            low, high, stride = max(0.0, low - stride), low, 2 * stride
            if excess(low) > 0:
                return float(brentq(excess, low, high, xtol=1e-13 * bound))
        return 0.0

    return _settled(composition, direction, order, target, solve)


def _settled(
    composition: Composition,
    direction: Direction,
    order: float,
    log_delta: float,
    evaluate: Callable[[_Contour], float],
) -> float | None:
    """Returns what two contours agree on, refining both as long as they do not.

    The trapezoid sum with step h is the sum over k of delta(epsilon + k w)
    exp(c k w), w = 2 pi / h. Of the aliases, k < 0 are at most exp(-c |k| w) and ask
    for w > log(1 / delta) / c; k > 0 ask for w far beyond the deviation of L.
    """
    try:
        deviation = _deviation(composition, direction, order)
    except MeshError:
        return None
    window = max((26 - log_delta) / order, 10 * deviation)
    if not _falls(composition, direction, order, 2 * math.pi / window * _MAX_NODES):
        return None
    for factor in _WINDOWS:
        try:
            first = evaluate(_contour(composition, direction, order, factor * window))
            second = evaluate(
                _contour(composition, direction, 1.1 * order, 1.3 * factor * window)
            )
        except (MeshError, ValueError):  # brentq's ValueError: no change of sign
            continue
        if abs(first - second) <= _AGREEMENT * max(abs(second), 1e-3):
            return second
    return None


def _falls(
    composition: Composition, direction: Direction, order: float, frequency: float
) -> bool:
    """Tells whether the integrand may be negligible from a frequency on."""
    ends = np.array([complex(order), order + 1j * frequency])
    try:
        logs = [log_moments(composition, ends[i : i + 1], direction) for i in (0, 1)]
    except MeshError:  # so fast a wave asks for too fine a mesh, and tells nothing
        return True
    near, far = (
        float((log[0] - np.log(s) - np.log1p(s)).real)
        for log, s in zip(logs, ends, strict=True)
    )
    return far < near + _LOG_NEGLIGIBLE


def _deviation(composition: Composition, direction: Direction, order: float) -> float:
    """Returns the deviation of L under exp(order L): (log M)'' = its square."""
    logs = [
        float(log_moments(composition, np.array([complex(c)]), direction)[0].real)
        for c in (0.98 * order, order, 1.02 * order)
    ]
    return math.sqrt(max(0.0, logs[0] - 2 * logs[1] + logs[2])) / (0.02 * order)


def _contour(
    composition: Composition, direction: Direction, order: float, window: float
) -> _Contour:
    """Returns the integrand on the line through an order, until it is negligible."""
    step = 2 * math.pi / window
    orders: list[NDArray[np.complex128]] = []
    logs: list[NDArray[np.complex128]] = []
    first, block = 0, _FIRST_BLOCK
    while first < _MAX_NODES:
        s = np.asarray(
            order + 1j * step * np.arange(first, first + block), np.complex128
        )
        orders.append(s)
        logs.append(log_moments(composition, s, direction) - np.log(s) - np.log1p(s))
        if logs[-1][-4:].real.max() < logs[0][0].real + _LOG_NEGLIGIBLE:
            return _Contour(np.concatenate(orders), np.concatenate(logs), step)
        first, block = first + block, 2 * block
    raise MeshError(f"the integrand is not negligible after {first} nodes")


def likely_epsilon(phases: Sequence[Phase], delta: float) -> float:
    """Returns the estimate of epsilon, or a quick bound where there is no estimate.

    Args:
        phases: Steps composed; phases may differ in all they have.
        delta: In (0, 1).
    """
    estimate = estimate_epsilon(phases, delta)
    return quick_epsilon(phases, delta) if estimate is None else estimate
