"""What Google's dp-accounting says of the same steps, where it is installed.

It is an independent implementation to check against. Nothing that is promised rests on
it, and nothing but tests, benchmarks and `bin/dpsgd-privacy compare` needs it.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Final

from dpsgd.privacy.bounds import Composition
from dpsgd.privacy.estimator import likely_epsilon
from dpsgd.privacy.losses import StepLoss
from dpsgd.privacy.mechanism import EpsilonBound, Phase, check_delta

__all__ = [
    "INSTALL",
    "peer_distribution",
    "peer_interval",
    "peer_is_installed",
    "peer_pld",
    "peer_rdp",
]

INSTALL: Final = "pip install dp-accounting"

_FINENESS: Final = 10_000
_MAX_BUCKETS: Final = 200_000


def peer_is_installed() -> bool:
    """Tells whether dp-accounting can be imported."""
    return importlib.util.find_spec("dp_accounting") is not None


def peer_interval(phases: Sequence[Phase], delta: float) -> float:
    """Returns a width of its buckets that is fine, and answered in seconds.

    Args:
        phases: Steps composed, at least one of them subsampled or noised.
        delta: In (0, 1).

    Raises:
        MeshError: A noise multiplier is below about 0.03.
    """
    composition = Composition.of(phases)
    losses = [
        StepLoss.of(phase, "remove", 1e-22).losses for phase in composition.phases
    ]
    widest = max((float(loss.max() - loss.min()) for loss in losses), default=0.0)
    fine = likely_epsilon(phases, delta) / _FINENESS
    return max(fine, widest / _MAX_BUCKETS, 1e-12)


def peer_pld(phases: Sequence[Phase], delta: float, interval: float) -> EpsilonBound:
    """Returns the bracket of its privacy loss distributions, over both directions.

    Args:
        phases: Steps composed.
        delta: In (0, 1); where 1e-15 times the number of steps is not far below, its
            rounding errors show.
        interval: Width of its buckets, > 0.

    Returns:
        Its optimistic answer, by privacy buckets, and twice its pessimistic one, by
        connecting dots; zeros without steps, inf without noise.

    Raises:
        ModuleNotFoundError: dp-accounting is not installed.
    """
    check_delta(delta)
    trivial = _trivial(phases)
    if trivial is not None:
        return EpsilonBound(trivial, trivial, trivial)
    optimist, pessimist = (
        peer_distribution(phases, interval, pessimistic=pessimistic)
        for pessimistic in (False, True)
    )
    upper = float(pessimist.get_epsilon_for_delta(delta))
    return EpsilonBound(float(optimist.get_epsilon_for_delta(delta)), upper, upper)


def peer_distribution(
    phases: Sequence[Phase], interval: float, *, pessimistic: bool
) -> Any:
    """Returns its distribution of the privacy loss of all steps.

    Args:
        phases: Steps composed, at least one that tells something, and not all.
        interval: Width of its buckets, > 0.
        pessimistic: Whether losses are rounded so as to overstate epsilon.

    Raises:
        ModuleNotFoundError: dp-accounting is not installed.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    for phase in phases:
        if phase.num_steps == 0 or phase.sample_rate == 0:
            continue
        step = pld.from_gaussian_mechanism(
            phase.noise_multiplier,
            sampling_prob=phase.sample_rate,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        steps = step.self_compose(phase.num_steps)
        total = steps if total is None else total.compose(steps)
    return total


def peer_rdp(phases: Sequence[Phase], delta: float) -> float:
    """Returns its Renyi bound, on its own table of orders.

    Args:
        phases: Steps composed.
        delta: In (0, 1).

    Raises:
        ModuleNotFoundError: dp-accounting is not installed.
    """
    from dp_accounting import dp_event, rdp

    check_delta(delta)
    trivial = _trivial(phases)
    if trivial is not None:
        return trivial
    accountant = rdp.RdpAccountant()
    for phase in phases:
        event = dp_event.GaussianDpEvent(phase.noise_multiplier)
        event = dp_event.PoissonSampledDpEvent(phase.sample_rate, event)
        accountant.compose(event, phase.num_steps)
    return float(accountant.get_epsilon(delta))


def _trivial(phases: Sequence[Phase]) -> float | None:
    """Returns epsilon where nothing is told, or all."""
    mu = Composition.of(phases).unamplified_mu
    return mu if mu == 0 or math.isinf(mu) else None
