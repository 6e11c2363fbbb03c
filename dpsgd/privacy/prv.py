"""The accountant `prv`: Microsoft's prv-accountant, completed where it is silent."""

from collections.abc import Sequence
from typing import ClassVar, Final, final

from dpsgd.errors import ConfigError, fault
from dpsgd.privacy.accountant import Accountant, closed_form, rising
from dpsgd.privacy.bounds import Composition, quick_epsilon
from dpsgd.privacy.certificate import (
    Certificate,
    affordable_error,
    certify,
    subsampled_phases,
)
from dpsgd.privacy.estimator import contour_epsilon, likely_epsilon
from dpsgd.privacy.lattice import larger_epsilon
from dpsgd.privacy.mechanism import EpsilonBound, Phase, check_delta

__all__ = ["PRVAccountant"]

_MIN_DELTA: Final = 1e-14
_RELATIVE_ERROR: Final = 1e-3
_WIDEST: Final = 1e-2
_MAX_NODES: Final = 1_500_000
_CURVE_NODES: Final = 4_000_000
_TOLERANCE: Final = 1e-4
_CURVE_TOLERANCE: Final = 1e-2


@final
class PRVAccountant(Accountant):
    """Certifies with prv-accountant, at about 0.1 % of epsilon, in seconds.

    The package composes the removal of an example; its addition is certified on a
    lattice, and so is removal where the package fails or would be off by more than
    1 % (tiny epsilons, noise_multiplier below 0.1). The larger direction counts. The
    promise is not above a Renyi bound or the epsilon without subsampling, each sound
    by itself, and never below the contour integral where one settles.

    Source: Gopi, Lee and Wutschitz 2021 (arXiv:2106.02848).
    """

    name: ClassVar[str] = "prv"
    description: ClassVar[str] = (
        "certified numerical composition (Gopi, Lee and Wutschitz 2021)"
    )

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
            certificate = _certificate(phases, delta, max_nodes=_MAX_NODES)
            self._answers[question] = _bracket(phases, delta, certificate, _TOLERANCE)
        return self._answers[question]

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
        nodes = _CURVE_NODES // (len(runs) + 3)
        certificate = _certificate(longest, delta, max_nodes=nodes)
        bounds = [_bracket(run, delta, certificate, _CURVE_TOLERANCE) for run in runs]
        return rising(steps, bounds)

    def slack(self, phases: Sequence[Phase], delta: float) -> float:
        """Returns how far `epsilon` is expected to end above the smallest epsilon.

        Args:
            phases: Steps composed.
            delta: In [1e-14, 1).

        Returns:
            Difference >= 0 in epsilon; 0 where the answer is exact.
        """
        if closed_form(phases, delta) is not None:
            return 0.0
        likely = likely_epsilon(phases, delta)
        error = _error(phases, delta, likely, max_nodes=_MAX_NODES)
        return 1.1 * (error if error <= _WIDEST * likely else _TOLERANCE * likely)


def _check_delta(delta: float) -> None:
    """Raises ConfigError unless the package's arithmetic can resolve delta."""
    check_delta(delta)
    if delta < _MIN_DELTA:
        rule = f"must be at least {_MIN_DELTA:g}, where rounding errors begin"
        raise ConfigError(fault("delta", delta, rule, "raise it, or take pld"))


def _error(
    phases: Sequence[Phase], delta: float, likely: float, *, max_nodes: int
) -> float:
    """Returns the half width that the package would answer with."""
    return affordable_error(
        Composition.of(phases),
        delta,
        eps_error=_RELATIVE_ERROR * likely,
        max_nodes=max_nodes,
    )


def _certificate(
    phases: Sequence[Phase], delta: float, *, max_nodes: int
) -> Certificate | None:
    """Asks the package, unless the answer is exact or would be too wide."""
    if closed_form(phases, delta) is not None:
        return None
    likely = likely_epsilon(phases, delta)
    error = _error(phases, delta, likely, max_nodes=max_nodes)
    if error > _WIDEST * likely:
        return None
    composition = Composition.of(phases)
    return certify(composition, delta, eps_error=error, max_nodes=max_nodes)


def _bracket(
    phases: Sequence[Phase],
    delta: float,
    certificate: Certificate | None,
    tolerance: float,
) -> EpsilonBound:
    """Returns the least sound bound of the larger direction, at least the estimate."""
    closed = closed_form(phases, delta)
    if closed is not None:
        return closed
    composition = Composition.of(phases)
    counts = [phase.num_steps for phase in subsampled_phases(composition)]
    certified = certificate.bound(counts) if certificate is not None else None
    lower, upper = (certified.lower, certified.upper) if certified else (0.0, 0.0)
    # Two methods that disagree widen the bracket: neither is trusted alone. Removal
    # is checked by the contour or, where there is none, on the lattice.
    contour = contour_epsilon(phases, delta)
    removal = upper if certified and contour is not None else None
    bound = larger_epsilon(composition, delta, tolerance=tolerance, removal=removal)
    upper = min(max(upper, bound), quick_epsilon(phases, delta))
    estimate = min(bound, upper) if contour is None else contour
    return EpsilonBound(min(lower, estimate), estimate, max(upper, estimate))
