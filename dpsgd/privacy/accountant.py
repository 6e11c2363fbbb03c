"""What an accountant is: from steps to an epsilon that may be promised.

An accountant answers with a bracket. Only its upper end may be promised; the lower
end and the estimate tell how much of it is slack. A new accountant is a file with a
class that has a name, a description and `epsilon`, such as `rdp`, and its entry in
`registry`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

from dpsgd.privacy.bounds import Composition, gaussian_epsilon, quick_epsilon
from dpsgd.privacy.estimator import likely_epsilon
from dpsgd.privacy.mechanism import EpsilonBound, Phase

__all__ = ["Accountant", "closed_form", "rising"]

_ROUNDING: Final = 1e-9


class Accountant(ABC):
    """Certifies epsilon for Poisson-subsampled Gaussian steps, add-or-remove-one."""

    name: ClassVar[str]
    """Key in `registry.ACCOUNTANTS`, and the spelling in a configuration."""

    description: ClassVar[str]
    """How it accounts, and (its source with the year), as statements tell it."""

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
            (S,) brackets in the order of `steps`; may be looser than `epsilon`.

        Raises:
            ConfigError: An argument is out of range.
        """
        runs = [[Phase(sample_rate, noise_multiplier, count)] for count in steps]
        return rising(steps, [self.epsilon(run, delta) for run in runs])

    def slack(self, phases: Sequence[Phase], delta: float) -> float:
        """Returns how far `epsilon` is expected to end above the smallest epsilon.

        A search uses it to aim; nothing that is promised depends on it.

        Args:
            phases: Steps composed.
            delta: In (0, 1).

        Returns:
            Difference >= 0 in epsilon.
        """
        upper = self.epsilon(phases, delta).upper
        expected = likely_epsilon(phases, delta)
        return max(0.0, upper - expected) if math.isfinite(upper) else 0.0


def closed_form(phases: Sequence[Phase], delta: float) -> EpsilonBound | None:
    """Returns the bracket where it is exact: full batches, no noise, nothing told.

    Args:
        phases: Steps composed.
        delta: In (0, 1).

    Returns:
        A bracket at most 2e-9 wide, relatively, or None where steps are subsampled.
    """
    composition = Composition.of(phases)
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


def rising(steps: Sequence[int], bounds: Sequence[EpsilonBound]) -> list[EpsilonBound]:
    """Lowers each upper end to the least of those after more steps, which bound it.

    Args:
        steps: (S,) numbers of steps, in any order.
        bounds: (S,) what is known after each.

    Returns:
        (S,) bounds in the order of `steps`.
    """
    result = list(bounds)
    least = math.inf
    for index in sorted(range(len(steps)), key=lambda i: steps[i], reverse=True):
        bound = bounds[index]
        least = min(least, bound.upper)
        result[index] = EpsilonBound(
            min(bound.lower, least), min(bound.estimate, least), least
        )
    return result
