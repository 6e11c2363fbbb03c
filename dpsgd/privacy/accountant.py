"""Accountants: from steps to a certified epsilon.

An accountant answers with a bracket. Only its upper end may be promised; the lower
end and the estimate tell how much of it is slack.
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final, final

from dpsgd.errors import ConfigError, fault
from dpsgd.privacy.bounds import Composition, gaussian_epsilon, quick_epsilon
from dpsgd.privacy.certificate import (
    Certificate,
    affordable_error,
    certify,
    subsampled_phases,
)
from dpsgd.privacy.estimator import estimate_epsilon, likely_epsilon
from dpsgd.privacy.mechanism import EpsilonBound, Phase, check_delta

__all__ = ["ACCOUNTANTS", "Accountant", "PRVAccountant", "build_accountant"]

_MIN_DELTA: Final = 1e-14
_RELATIVE_ERROR: Final = 1e-3
_MAX_NODES: Final = 1_500_000
_CURVE_NODES: Final = 4_000_000
_ROUNDING: Final = 1e-9


class Accountant(ABC):
    """Certifies epsilon for Poisson-subsampled Gaussian steps, add-or-remove-one."""

    name: ClassVar[str]
    """Key in `ACCOUNTANTS`, and the spelling in a configuration."""

    @abstractmethod
    def epsilon(self, phases: Sequence[Phase], delta: float) -> EpsilonBound:
        """Returns a bracket around the smallest epsilon.

        Guarantees:
            The steps are (upper, delta)-DP, whatever else fails.

        Args:
            phases: Steps composed; phases may differ in all they have.
            delta: In (0, 1).

        Returns:
            lower <= estimate <= upper; zeros without steps, inf without noise.

        Raises:
            ConfigError: `delta` is out of range.
        """

    @abstractmethod
    def epsilon_curve(
        self,
        *,
        sample_rate: float,
        noise_multiplier: float,
        steps: Sequence[int],
        delta: float,
    ) -> list[EpsilonBound]:
        """Returns the bracket after each of several numbers of steps.

        Guarantees:
            As `epsilon`, for each; upper never falls as the number of steps grows.

        Args:
            sample_rate: In (0, 1].
            noise_multiplier: >= 0, finite.
            steps: (S,) numbers of steps, each >= 0, in any order.
            delta: In (0, 1).

        Returns:
            (S,) brackets in the order of `steps`; looser than those of `epsilon`.

        Raises:
            ConfigError: An argument is out of range.
        """

    @abstractmethod
    def slack(self, phases: Sequence[Phase], delta: float) -> float:
        """Returns how far `epsilon` is expected to end above the smallest epsilon.

        A search uses it to aim; nothing that is promised depends on it.

        Args:
            phases: Steps composed.
            delta: In (0, 1).

        Returns:
            Difference >= 0 in epsilon.
        """


@final
class PRVAccountant(Accountant):
    """Certifies with prv-accountant, at about 0.1 % of epsilon, in seconds.

    What it promises is the least of the package's upper bound, a Renyi bound and the
    epsilon without subsampling, each sound by itself, but never less than the
    estimate of `estimate_epsilon`. The package computes the direction of removal only;
    the estimate covers both. Where the package cannot answer (noise_multiplier below
    0.1, a failure inside), the other two bounds stand: loose, and sound.

    Source: Gopi, Lee and Wutschitz 2021 (arXiv:2106.02848).
    """

    name: ClassVar[str] = "prv"

    def __init__(self) -> None:
        # Calibration, plan and ledger ask the same question, which costs seconds.
        self._answers: dict[tuple[tuple[Phase, ...], float], EpsilonBound] = {}

    def epsilon(self, phases: Sequence[Phase], delta: float) -> EpsilonBound:
        """Returns a bracket around the smallest epsilon.

        Guarantees:
            The steps are (upper, delta)-DP. With full batches only, both ends are
            the exact epsilon of the Gaussian mechanism, to a relative 1e-9.

        Args:
            phases: Steps composed; phases may differ in all they have.
            delta: In [1e-14, 1): below, the package's rounding errors dominate.

        Returns:
            lower <= estimate <= upper, upper about 0.1 % above the estimate, and
            more where that would take too many nodes (from about 20,000 steps on);
            zeros without steps or where delta allows everything, inf without noise.

        Raises:
            ConfigError: `delta` is out of range.
        """
        _check_delta(delta)
        question = (tuple(phases), delta)
        if question not in self._answers:
            self._answers[question] = self._certified(phases, delta)
        return self._answers[question]

    def _certified(self, phases: Sequence[Phase], delta: float) -> EpsilonBound:
        """Answers `epsilon` anew."""
        composition = Composition.of(phases)
        closed = _closed_form(composition, phases, delta)
        if closed is not None:
            return closed
        certificate = certify(
            composition,
            delta,
            eps_error=_RELATIVE_ERROR * likely_epsilon(phases, delta),
            max_nodes=_MAX_NODES,
        )
        return _bracket(phases, delta, certificate)

    def epsilon_curve(
        self,
        *,
        sample_rate: float,
        noise_multiplier: float,
        steps: Sequence[int],
        delta: float,
    ) -> list[EpsilonBound]:
        """Returns the bracket after each of several numbers of steps.

        One discretisation, made for the most steps, answers for all; the more
        numbers are asked for, the coarser it is, so that the time stays at seconds.

        Guarantees:
            As `epsilon`, for each; upper never falls as the number of steps grows.

        Args:
            sample_rate: In (0, 1].
            noise_multiplier: >= 0, finite.
            steps: (S,) numbers of steps, each >= 0, in any order.
            delta: In [1e-14, 1).

        Returns:
            (S,) brackets in the order of `steps`, about 0.5 to 3 % wide.

        Raises:
            ConfigError: An argument is out of range.
        """
        _check_delta(delta)
        runs = [[Phase(sample_rate, noise_multiplier, count)] for count in steps]
        longest = max(runs, key=lambda run: run[0].num_steps, default=[])
        composition = Composition.of(longest)
        certificate = None
        if _closed_form(composition, longest, delta) is None:
            certificate = certify(
                composition,
                delta,
                eps_error=_RELATIVE_ERROR * likely_epsilon(longest, delta),
                max_nodes=_CURVE_NODES // (len(runs) + 3),
            )
        return _rising(steps, [_bracket(run, delta, certificate) for run in runs])

    def slack(self, phases: Sequence[Phase], delta: float) -> float:
        """Returns how far `epsilon` is expected to end above the smallest epsilon.

        Args:
            phases: Steps composed.
            delta: In [1e-14, 1).

        Returns:
            Difference >= 0 in epsilon; 0 where the answer is exact.
        """
        composition = Composition.of(phases)
        if _closed_form(composition, phases, delta) is not None:
            return 0.0
        wanted = _RELATIVE_ERROR * likely_epsilon(phases, delta)
        return 1.1 * affordable_error(
            composition, delta, eps_error=wanted, max_nodes=_MAX_NODES
        )


ACCOUNTANTS: Final[dict[str, type[Accountant]]] = {
    accountant.name: accountant for accountant in (PRVAccountant,)
}
"""Accountants by name; a new one is registered by adding it here."""


def build_accountant(name: str) -> Accountant:
    """Returns the accountant of a name.

    Args:
        name: A key of `ACCOUNTANTS`.

    Raises:
        ConfigError: There is no such accountant.
    """
    if name not in ACCOUNTANTS:
        near = difflib.get_close_matches(name, ACCOUNTANTS, n=1, cutoff=0.0)
        raise ConfigError(
            fault("accountant", name, "is not known", f"did you mean {near[0]}?")
        )
    return ACCOUNTANTS[name]()


def _check_delta(delta: float) -> None:
    """Raises ConfigError unless the package's arithmetic can resolve delta."""
    check_delta(delta)
    if delta < _MIN_DELTA:
        rule = f"must be at least {_MIN_DELTA:g}, where rounding errors begin"
        raise ConfigError(fault("delta", delta, rule, "raise it"))


def _closed_form(
    composition: Composition, phases: Sequence[Phase], delta: float
) -> EpsilonBound | None:
    """Returns the bracket where it is exact: full batches, no noise, nothing told."""
    if composition.phases:
        exact = quick_epsilon(phases, delta)
        if exact == 0 or math.isinf(exact):
            return EpsilonBound(exact, exact, exact)
        return None
    exact = gaussian_epsilon(composition.gaussian_mu, delta)
    if exact == 0 or math.isinf(exact):
        return EpsilonBound(exact, exact, exact)
    below = 1 - (_ROUNDING if composition.gaussian_mu < 1e8 else 1e-6)
    return EpsilonBound(exact * below, exact, exact * (1 + _ROUNDING))


def _bracket(
    phases: Sequence[Phase], delta: float, certificate: Certificate | None
) -> EpsilonBound:
    """Returns the least of the sound bounds, and at least the estimate."""
    composition = Composition.of(phases)
    closed = _closed_form(composition, phases, delta)
    if closed is not None:
        return closed
    upper, lower = quick_epsilon(phases, delta), 0.0
    middle = upper
    counts = [phase.num_steps for phase in subsampled_phases(composition)]
    certified = certificate.bound(counts) if certificate is not None else None
    if certified is not None:
        upper, lower = min(upper, certified.upper), certified.lower
        middle = certified.estimate
    estimate = estimate_epsilon(phases, delta)
    if estimate is not None:
        # Two methods that disagree widen the bracket: neither is trusted alone.
        upper, lower = max(upper, estimate), min(lower, estimate)
        middle = estimate
    return EpsilonBound(min(lower, upper), min(max(middle, lower), upper), upper)


def _rising(steps: Sequence[int], bounds: Sequence[EpsilonBound]) -> list[EpsilonBound]:
    """Lowers each upper end to the least of those after more steps, which bound it."""
    result = list(bounds)
    least = math.inf
    for index in sorted(range(len(steps)), key=lambda i: steps[i], reverse=True):
        bound = bounds[index]
        least = min(least, bound.upper)
        result[index] = EpsilonBound(
            min(bound.lower, least), min(bound.estimate, least), least
        )
    return result
