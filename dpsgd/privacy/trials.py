r"""What many trials prove: bounds on epsilon from scores with and without a canary.

One mechanism is tried again and again, half of the times with a canary in its data. A
score of what was released says "in" above a threshold. Half of the trials choose the
threshold and the other half count, so that no chance is counted that was chosen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import beta

from dpsgd.errors import fault
from dpsgd.privacy.audit import check_confidence
from dpsgd.privacy.bounds import gaussian_epsilon
from dpsgd.privacy.mechanism import check_delta

__all__ = ["Trials", "rate_bounds"]

_TRIED_THRESHOLDS: Final = 20

Scores = NDArray[np.float64]


def rate_bounds(
    successes: int, num_trials: int, *, error: float
) -> tuple[float, float]:
    """Returns bounds on a probability, each wrong with probability `error` at most.

    Args:
        successes: In [0, num_trials].
        num_trials: Independent trials, >= 1.
        error: In (0, 1), of each of the two bounds.

    Returns:
        (lower, upper), in [0, 1].

    Source: Clopper and Pearson 1934.

    >>> rate_bounds(0, 10, error=0.05)[0], round(rate_bounds(0, 10, error=0.05)[1], 4)
    (0.0, 0.2589)
    """
    failures = num_trials - successes
    lower = beta.ppf(error, successes, failures + 1) if successes else 0.0
    upper = beta.isf(error, successes + 1, failures) if failures else 1.0
    return float(lower), float(upper)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trials:
    """Scores of independent trials of one mechanism on two neighbouring data sets.

    Args:
        with_canary: (n,) scores of the trials with the canary; they tend to be higher.
        without: (n',) scores of the others.

    Raises:
        ValueError: There are fewer than two trials of a kind.
    """

    with_canary: Scores
    without: Scores

    def __post_init__(self) -> None:
        fewest = min(len(self.with_canary), len(self.without))
        if fewest < 2:
            rule = "half of the trials choose the threshold, the other half count"
            raise ValueError(fault("trials", fewest, rule, "give two of each kind"))

    def epsilon_lower_bound(self, *, delta: float, confidence: float) -> float:
        r"""Returns the largest epsilon that the trials refute, whatever was tried.

        Under (epsilon, delta)-DP, $P(\mathrm{in} \mid \mathrm{with}) \le e^\epsilon
        P(\mathrm{in} \mid \mathrm{without}) + \delta$, and likewise of "out" with the
        two exchanged.

        Guarantees:
            If the mechanism is (epsilon, delta)-DP and the trials are independent,
            the returned value is at most epsilon with probability `confidence` or
            more.

        Args:
            delta: Claimed, in (0, 1).
            confidence: In (0, 1).

        Returns:
            Epsilon >= 0; 0 where nothing is refuted.

        Source: Nasr et al. 2021 (arXiv:2101.04535).
        """
        check_delta(delta)

        def shown(caught: float, mistaken: float) -> float:
            return max(
                _log_ratio(caught - delta, mistaken),
                _log_ratio(1 - mistaken - delta, 1 - caught),
            )

        return self._shown(shown, confidence)

    def epsilon_if_gaussian(self, *, delta: float, confidence: float) -> float:
        r"""Returns a lower bound that takes the mechanism for a Gaussian one.

        Under $\mu$-GDP, $\Phi^{-1}(P(\mathrm{in} \mid \mathrm{with})) -
        \Phi^{-1}(P(\mathrm{in} \mid \mathrm{without})) \le \mu$ at every threshold, so
        that the middle, where both rates are known well, says most.

        Guarantees:
            If the mechanism is $\mu$-GDP and the trials are independent, the returned
            value is at most the epsilon of $\mu$ with probability `confidence` or
            more.

        Args:
            delta: At which epsilon is stated, in (0, 1).
            confidence: In (0, 1).

        Returns:
            Epsilon >= 0; 0 where nothing is refuted.

        Source: Nasr et al. 2023, "Tight Auditing" (arXiv:2302.07956).
        """
        check_delta(delta)

        def shown(caught: float, mistaken: float) -> float:
            return float(ndtri(caught) - ndtri(mistaken))

        return gaussian_epsilon(self._shown(shown, confidence), delta)

    def _shown(
        self, shown: Callable[[float, float], float], confidence: float
    ) -> float:
        """Returns what the counting half shows at the threshold that was chosen."""
        check_confidence(confidence)

        def at(threshold: float, half: int) -> float:
            caught, mistaken = (
                rate_bounds(
                    int((scores[half::2] > threshold).sum()),
                    len(scores[half::2]),
                    error=(1 - confidence) / 2,
                )
                for scores in (self.with_canary, self.without)
            )
            return shown(caught[0], mistaken[1])

        choosing = np.concatenate([self.with_canary[::2], self.without[::2]])
        candidates = np.quantile(choosing, np.linspace(0.0, 1.0, _TRIED_THRESHOLDS))
        chosen = max(candidates, key=lambda threshold: at(threshold, 0))
        return max(0.0, at(chosen, 1))


def _log_ratio(numerator: float, denominator: float) -> float:
    """Returns log(numerator / denominator); -inf where the ratio is not positive.

    A denominator is an upper bound on a rate, so it is 0 for no number of trials.
    """
    return math.log(numerator / denominator) if numerator > 0 else -math.inf
