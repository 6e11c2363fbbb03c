"""The central limit of Gaussian differential privacy: a popular figure, not a bound."""

import math
from collections.abc import Sequence

from dpsgd.privacy.bounds import gaussian_epsilon
from dpsgd.privacy.mechanism import Phase, check_delta

__all__ = ["gdp_epsilon"]


def gdp_epsilon(phases: Sequence[Phase], delta: float) -> float:
    """Returns the epsilon of the Gaussian mechanism that ever more steps approach.

    It is no `Accountant`: for as many steps as anyone takes it tends to lie below the
    smallest epsilon, by half where the noise is small.

    Args:
        phases: Steps composed; phases may differ in all they have.
        delta: In (0, 1).

    Returns:
        Epsilon >= 0 that must not be promised; inf without noise.

    Raises:
        ConfigError: `delta` is out of range.

    Source: Bu, Dong, Long and Su 2020 (arXiv:1911.11607), for Poisson sampling: mu =
        q sqrt(T (exp(1 / sigma^2) - 1)); full batches enter by their own mu.

    >>> round(gdp_epsilon([Phase(0.01, 0.5, 100)], 1e-5), 2)  # the smallest is 6.48
    3.06
    """
    check_delta(delta)
    square = sum(_squared_mu(phase) for phase in phases)
    return gaussian_epsilon(math.sqrt(square), delta)


def _squared_mu(phase: Phase) -> float:
    """Returns mu^2 of the steps of a phase."""
    q, sigma, steps = phase.sample_rate, phase.noise_multiplier, phase.num_steps
    if q == 0 or steps == 0:
        return 0.0
    if sigma < 0.04:  # exp(1 / sigma^2) is more than a double holds
        return math.inf
    if q == 1:
        return steps / sigma**2
    return q**2 * steps * math.expm1(1 / sigma**2)
