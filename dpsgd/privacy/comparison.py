"""Every account of the same steps, side by side: how far they agree."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from dpsgd.privacy.bounds import MeshError
from dpsgd.privacy.estimator import contour_epsilon, estimate_epsilon
from dpsgd.privacy.gdp import gdp_epsilon
from dpsgd.privacy.mechanism import Phase, check_delta
from dpsgd.privacy.peer import INSTALL, peer_interval, peer_is_installed, peer_pld
from dpsgd.privacy.registry import ACCOUNTANTS, build_accountant

__all__ = ["Opinion", "compare"]

_CERTIFIED: Final = "upper bound"
_EXACT: Final = "nearly exact"
_COARSE: Final = "coarse bound"
_LIMIT: Final = "approximation"
_BRACKET: Final = "bracket"
_NOISELESS: Final = "no answer: too little noise"


@dataclass(frozen=True)
class Opinion:
    """What one method says of epsilon.

    Args:
        method: Its name.
        lower: Epsilon is at least this; None if it does not say.
        epsilon: Its figure, which may be promised if `kind` is an upper bound; None if
            there is no answer.
        kind: What the figure is, or why there is none.
        seconds: Time it took.
    """

    method: str
    lower: float | None
    epsilon: float | None
    kind: str
    seconds: float


def compare(phases: Sequence[Phase], delta: float) -> list[Opinion]:
    """Asks every accountant, the estimator, the central limit and dp-accounting.

    Args:
        phases: Steps composed; phases may differ in all they have.
        delta: In (0, 1), and such that every accountant can resolve it.

    Returns:
        Registered accountants first; dp-accounting last, if only to tell how it is
        installed.

    Raises:
        ConfigError: `delta` is out of range.
    """
    check_delta(delta)
    certified = [
        _timed(name, _CERTIFIED, partial(_certified, name, phases, delta))
        for name in ACCOUNTANTS
    ]
    return [
        *certified,
        _estimate(phases, delta),
        _timed("gdp", _LIMIT, lambda: (None, gdp_epsilon(phases, delta))),
        _peer(phases, delta),
    ]


def _timed(
    method: str, kind: str, ask: Callable[[], tuple[float | None, float | None]]
) -> Opinion:
    """Asks one method, and measures how long it takes to answer."""
    started = time.perf_counter()
    lower, epsilon = ask()
    seconds = time.perf_counter() - started
    return Opinion(method, lower, epsilon, kind, seconds)


def _certified(
    name: str, phases: Sequence[Phase], delta: float
) -> tuple[float | None, float | None]:
    """Asks an accountant, of which 0 as a lower end says nothing."""
    bound = build_accountant(name).epsilon(phases, delta)
    return bound.lower if bound.lower > 0 else None, bound.upper


def _estimate(phases: Sequence[Phase], delta: float) -> Opinion:
    """Asks the estimator, which has a bound to give where no contour settles."""
    found = _timed("estimate", _EXACT, lambda: (None, estimate_epsilon(phases, delta)))
    if found.epsilon is None:
        return replace(found, kind=_NOISELESS)
    settled = contour_epsilon(phases, delta) is not None
    return found if settled else replace(found, kind=_COARSE)


def _peer(phases: Sequence[Phase], delta: float) -> Opinion:
    """Asks dp-accounting, if it is there and can answer."""
    method = "dp-accounting"
    if not peer_is_installed():
        return Opinion(method, None, None, f"not installed: {INSTALL}", 0.0)

    def ask() -> tuple[float, float]:
        bound = peer_pld(phases, delta, peer_interval(phases, delta))
        return bound.lower, bound.upper

    try:
        return _timed(method, _BRACKET, ask)
    except (MeshError, OverflowError):
        return Opinion(method, None, None, _NOISELESS, 0.0)
