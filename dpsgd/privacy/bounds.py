r"""Sound upper bounds on epsilon that cost milliseconds, and the moments behind them.

One Poisson-subsampled Gaussian step compares N(0, sigma^2) with the mixture
(1 - q) N(0, sigma^2) + q N(1, sigma^2) of the same noise: sensitivity is scaled to 1.
Their density ratio at x is r(x) = 1 - q + q exp((2 x - 1) / (2 sigma^2)), and all is
said by K(z) = E[r(x)^z], x ~ N(0, sigma^2): the privacy loss L of removing an example
has E[exp(s L)] = K(s + 1), that of adding one has E[exp(s L)] = K(-s).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr, ndtr

from dpsgd.privacy.mechanism import Phase

__all__ = [
    "DIRECTIONS",
    "Composition",
    "Direction",
    "MeshError",
    "gaussian_delta",
    "gaussian_epsilon",
    "log_factor",
    "log_moments",
    "mean_loss",
    "quick_epsilon",
    "renyi_epsilon",
    "renyi_log_delta",
    "solved",
    "total_variation",
]

Direction = Literal["remove", "add"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("remove", "add")

_ROUNDING: Final = 1e-9
_LOG_ROUNDING: Final = 1e-12
_MAX_SOLVED_MU: Final = 1e8
_MIN_MESHED_NOISE: Final = 1e-3
_MAX_POINTS: Final = 50_000
_MAX_PRODUCT: Final = 1_500_000
_ORDERS: Final = (1e-4, 1e6)

Complex = NDArray[np.complex128]
Real = NDArray[np.float64]


class MeshError(ArithmeticError):
    """A quadrature would need more points than it is worth."""


@dataclass(frozen=True)
class Composition:
    """Phases sorted by how they are accounted for; none of them is trivial.

    Args:
        phases: Phases with 0 < q < 1, sigma > 0 and at least one step, merged where
            q and sigma agree.
        gaussian_mu: sqrt(sum of steps / sigma^2) of the phases with q = 1; inf if
            any phase with q > 0 has sigma = 0 and at least one step.
    """

    phases: tuple[Phase, ...]
    gaussian_mu: float

    @classmethod
    def of(cls, phases: Iterable[Phase]) -> Self:
        """Returns the composition of phases, in any order.

        Args:
            phases: Any number of phases; those that release nothing are dropped.
        """
        steps: dict[tuple[float, float], int] = {}
        gaussian_mu = 0.0
        for phase in phases:
            if phase.num_steps == 0 or phase.sample_rate == 0:
                continue
            if phase.noise_multiplier == 0:
                gaussian_mu = math.inf
            elif phase.sample_rate == 1:
                part = math.sqrt(phase.num_steps) / phase.noise_multiplier
                gaussian_mu = math.hypot(gaussian_mu, part)
            else:
                key = (phase.sample_rate, phase.noise_multiplier)
                steps[key] = steps.get(key, 0) + phase.num_steps
        merged = tuple(Phase(q, sigma, n) for (q, sigma), n in sorted(steps.items()))
        return cls(merged, gaussian_mu)

    @property
    def num_steps(self) -> int:
        """Steps of the subsampled phases."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def unamplified_mu(self) -> float:
        """The mu of the same steps without subsampling, which reveal no less.

        Replacing N(1, sigma^2) by N(0, sigma^2) with probability 1 - q turns the
        Gaussian pair into the subsampled one, and processing cannot add to the loss.
        """
        return math.hypot(
            self.gaussian_mu,
            *(math.sqrt(p.num_steps) / p.noise_multiplier for p in self.phases),
        )


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Returns the smallest delta of a Gaussian mechanism at an epsilon.

    Args:
        mu: l2_sensitivity / noise_std, >= 0; inf is no noise.
        epsilon: >= 0.

    Returns:
        Delta in [0, 1]; 0 if mu = 0, 1 if mu is inf.

    Source: Balle and Wang 2018, Theorem 8 (arXiv:1805.06530).

    >>> round(gaussian_delta(1.0, 4.377178), 10)
    1e-05
    """
    if mu == 0 or math.isinf(mu):
        return 0.0 if mu == 0 else 1.0
    low, high = -mu / 2 - epsilon / mu, mu / 2 - epsilon / mu
    gap = epsilon + float(log_ndtr(low)) - float(log_ndtr(high))
    return max(0.0, float(ndtr(high)) * -math.expm1(min(gap, 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the smallest epsilon of a Gaussian mechanism at a delta.

    Several full-batch steps are one Gaussian mechanism with mu^2 = sum of
    1 / sigma^2, and any DP-SGD run reveals at most what its steps would without
    subsampling, so this bounds every run.

    Args:
        mu: l2_sensitivity / noise_std, >= 0; inf is no noise.
        delta: In (0, 1).

    Returns:
        Epsilon >= 0, to a relative error of 1e-12, or, for mu > 1e8, at most 1e-6 too
        large; inf if mu, or mu^2, is inf.

    Source: Balle and Wang 2018, Theorem 8 (arXiv:1805.06530); composition: Dong, Roth
        and Su 2019, Corollary 3.3 (arXiv:1905.02383).

    >>> round(gaussian_epsilon(1.0, 1e-5), 6)
    4.377178
    """
    # P[L > epsilon] >= delta(epsilon), and L ~ N(mu^2 / 2, mu^2).
    top = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    if mu > _MAX_SOLVED_MU:
        return top
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    return solved(lambda epsilon: gaussian_delta(mu, epsilon) - delta, top)


def solved(excess: Callable[[float], float], top: float) -> float:
    """Returns the root in [0, top] of a falling function that ends below 0."""
    return float(brentq(excess, 0.0, top, xtol=1e-13 * top, maxiter=1000))


def total_variation(composition: Composition) -> float:
    """Returns an upper bound on delta at epsilon 0, in either direction.

    Args:
        composition: Steps composed.

    Returns:
        Bound >= 0 on the total variation distance, to which each step adds at most
        q (2 Phi(1 / (2 sigma)) - 1); may exceed 1.
    """
    steps = sum(
        p.num_steps * p.sample_rate * gaussian_delta(1 / p.noise_multiplier, 0.0)
        for p in composition.phases
    )
    return steps + gaussian_delta(composition.gaussian_mu, 0.0)


def _points(phase: Phase, power: float, frequency: float) -> tuple[Real, Real]:
    """Returns log r(x) and the log of weight * r(x)^power on a trapezoid mesh.

    The step keeps the error of the trapezoid rule near exp(-40): it is bounded on
    the widest strip around the real line in which the integrand is analytic and small.
    """
    q, sigma = phase.sample_rate, phase.noise_multiplier
    if sigma < _MIN_MESHED_NOISE:
        raise MeshError(f"noise_multiplier {sigma}")
    growth = 20 * max(0.0, -power) / sigma**4
    band = math.sqrt(80 / sigma**2 + growth) + frequency / sigma**2
    step = min(
        2 * math.pi / band,
        2 * math.pi**2 * sigma**2 / (40 + 5 * sigma**2 + math.pi * frequency),
    )
    low, high = min(0.0, power) - 9.5 * sigma, max(0.0, power) + 9.5 * sigma
    count = math.ceil((high - low) / step)
    if count > _MAX_POINTS:
        raise MeshError(f"{count} quadrature points")
    x = low + step * np.arange(count + 1)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    log_weight = math.log(step / sigma / math.sqrt(2 * math.pi)) - (x / sigma) ** 2 / 2
    tilted = power * log_ratio + log_weight
    keep = tilted > tilted.max() - 42
    return log_ratio[keep], tilted[keep]


def _log_moments_of_step(phase: Phase, powers: Complex) -> Complex:
    """Returns log K at powers that share their real part."""
    real = float(powers[0].real)
    frequency = float(np.abs(powers.imag).max())
    log_ratio, tilted = _points(phase, real, frequency)
    top = tilted.max()
    weights = np.exp(tilted - top)
    if frequency == 0:
        return np.full(powers.shape, top + math.log(weights.sum()), np.complex128)
    if powers.size * log_ratio.size > _MAX_PRODUCT:
        raise MeshError(f"{powers.size} orders at {log_ratio.size} points")
    waves = np.exp(1j * np.outer(powers.imag, log_ratio))
    return np.asarray(top + np.log(waves @ weights))


def log_moments(
    composition: Composition, orders: Complex, direction: Direction
) -> Complex:
    """Returns log E[exp(s L)] of the privacy loss L of a composition.

    Args:
        composition: Steps composed.
        orders: (S,) orders s with one common real part c > 0.
        direction: Whether the example is removed or added.

    Returns:
        (S,) logarithms, to an absolute error of about 1e-12 a step.

    Raises:
        MeshError: Too many quadrature points are needed: c or the imaginary part is
            huge, or sigma tiny.
    """
    powers = orders + 1 if direction == "remove" else -orders
    total = composition.gaussian_mu**2 * orders * (orders + 1) / 2
    for phase in composition.phases:
        total = total + phase.num_steps * _log_moments_of_step(phase, powers)
    return total


def _log_moment(composition: Composition, order: float, direction: Direction) -> float:
    """Returns log E[exp(order L)], rounded up; or the larger one of the Gaussian."""
    try:
        exact = log_moments(composition, np.array([complex(order)]), direction)
    except MeshError:
        return composition.unamplified_mu**2 * order * (order + 1) / 2
    return float(exact[0].real) + _LOG_ROUNDING * composition.num_steps


def _tilt(
    composition: Composition,
    direction: Direction,
    objective: Callable[[float, float], float],
) -> tuple[float, float]:
    """Returns the least objective(c, log E[exp(c L)]) over c > 0, and its order c."""
    found = minimize_scalar(
        lambda log_order: objective(
            math.exp(log_order),
            _log_moment(composition, math.exp(log_order), direction),
        ),
        bounds=(math.log(_ORDERS[0]), math.log(_ORDERS[1])),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(found.fun), math.exp(found.x)


def log_factor(order: float) -> float:
    """Returns log of c^c / (c + 1)^(c + 1), the peak of (1 - exp(-x)) exp(-c x)."""
    return order * math.log(order) - (order + 1) * math.log1p(order)


def renyi_epsilon(
    composition: Composition, delta: float, direction: Direction
) -> tuple[float, float]:
    """Returns a sound epsilon from moments, 5 to 10 % above the smallest one.

    For each order c > 0, max(0, 1 - exp(epsilon - L)) <= exp(c (L - epsilon)) *
    c^c / (c + 1)^(c + 1), whose mean bounds delta; the best c is taken.

    Guarantees:
        An upper bound for its direction at whatever order it ends, so that a poor
        minimisation costs tightness only.

    Args:
        composition: Steps composed, without infinite terms.
        delta: In (0, 1).
        direction: Whether the example is removed or added.

    Returns:
        Epsilon >= 0 and the order c = alpha - 1 it was found at.

    Source: Canonne, Kamath and Steinke 2020, conversion of Renyi to approximate
        differential privacy (arXiv:2004.00010).
    """

    def objective(order: float, log_moment: float) -> float:
        return (log_moment + log_factor(order) - math.log(delta)) / order

    epsilon, order = _tilt(composition, direction, objective)
    return max(0.0, epsilon + _ROUNDING * abs(epsilon)), order


def renyi_log_delta(
    composition: Composition, epsilon: float, direction: Direction
) -> tuple[float, float]:
    """Returns a sound log(delta) from moments, and the order c it was found at.

    Args:
        composition: Steps composed, without infinite terms.
        epsilon: >= 0.
        direction: Whether the example is removed or added.

    Returns:
        Logarithm <= 0 of a delta that is never too small, and the order.

    Source: As `renyi_epsilon`.
    """

    def objective(order: float, log_moment: float) -> float:
        return log_moment - epsilon * order + log_factor(order)

    log_delta, order = _tilt(composition, direction, objective)
    return min(0.0, log_delta + _ROUNDING), order


def quick_epsilon(phases: Iterable[Phase], delta: float) -> float:
    """Returns a sound epsilon, the least of four bounds, in milliseconds.

    Guarantees:
        Never below the smallest epsilon, in either direction. Tight to 1e-9 for
        full-batch steps, to about 10 % for moderate noise; for noise_multiplier far
        below 1 it ends at the epsilon without amplification by sampling.

    Args:
        phases: Steps composed; phases may differ in all they have.
        delta: In (0, 1).

    Returns:
        Epsilon >= 0; 0 without steps or if delta allows all; inf without noise.
    """
    composition = Composition.of(phases)
    bound = gaussian_epsilon(composition.unamplified_mu, delta) * (1 + _ROUNDING)
    if not composition.phases or math.isinf(bound):
        return bound
    if total_variation(composition) * (1 + _ROUNDING) <= delta:
        return 0.0
    renyi = max(renyi_epsilon(composition, delta, d)[0] for d in DIRECTIONS)
    return min(bound, renyi)


def mean_loss(phase: Phase) -> float:
    """Returns the mean privacy loss of one step, in the direction of removal.

    Args:
        phase: A phase with noise_multiplier > 0 and sample_rate in (0, 1].

    Returns:
        E[r log r] >= 0, to an absolute error of about 1e-15.

    Raises:
        MeshError: noise_multiplier is tiny.
    """
    if phase.sample_rate == 1:
        return 0.5 / phase.noise_multiplier**2
    log_ratio, tilted = _points(phase, 1.0, 0.0)
    weights = np.exp(tilted)
    return float(weights @ log_ratio / weights.sum())
