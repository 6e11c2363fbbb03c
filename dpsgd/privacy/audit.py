r"""What one audited run proves: lower bounds on epsilon from guesses about canaries.

Each of m canaries is in the training set by its own fair coin. Whoever sees what the
run released guesses the coins, and may abstain. If the run is (epsilon, delta)-DP, few
guesses can be right; so many right ones refute every epsilon up to the bound here.

An audit can refute a claim and never prove one: how much it shows depends on how well
it guesses, the epsilon of the accountant does not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom

from dpsgd.errors import ConfigError, fault
from dpsgd.privacy.bounds import gaussian_epsilon, solved
from dpsgd.privacy.mechanism import check_delta

__all__ = [
    "AuditResult",
    "CanaryResult",
    "Guesses",
    "check_confidence",
    "epsilon_if_gaussian",
    "epsilon_lower_bound",
    "examine",
    "gaussian_mu",
    "guess",
    "guesses_to_make",
    "p_value",
]

_BISECTIONS: Final = 30
_MAX_EPSILON: Final = 1e3
_MAX_MU: Final = 1e3
_TRIED_THRESHOLDS: Final = 30

Coins = NDArray[np.bool_]
Scores = NDArray[np.float64]


def check_confidence(confidence: float) -> None:
    """Raises ConfigError unless a confidence is in (0, 1)."""
    if not 0 < confidence < 1:
        raise ConfigError(
            fault("confidence", confidence, "must be in (0, 1)", "0.95 is usual")
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Guesses:
    """How the guesses of one run came out.

    Args:
        num_canaries: Canaries m, each in by its own fair coin.
        num_guesses: Coins guessed, in [0, m]; the others were abstained from. It must
            not depend on the coins.
        num_correct: Guesses that are right, in [0, num_guesses].

    Raises:
        ValueError: The numbers are not in this order.
    """

    num_canaries: int
    num_guesses: int
    num_correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_correct <= self.num_guesses <= self.num_canaries:
            rule = "must be 0 <= num_correct <= num_guesses <= num_canaries"
            raise ValueError(fault("guesses", self, rule, "count them again"))


@dataclass(frozen=True, kw_only=True, eq=False)
class CanaryResult:
    """What the canaries of one kind showed.

    Attributes:
        is_in: (m,) coins, True where the canary was in the training set.
        scores: (m,) of the auditor, who did not see the coins; high means in.
        guesses: How many coins were guessed, and how many of them right.
        epsilon_lower_bound: Refuted up to here, whatever the mechanism.
        epsilon_if_gaussian: Refuted up to here, if the mechanism is a Gaussian one.
    """

    is_in: Coins
    scores: Scores
    guesses: Guesses
    epsilon_lower_bound: float
    epsilon_if_gaussian: float


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditResult:
    """What an audit showed, beside what is claimed.

    Attributes:
        epsilon: Upper bound that is claimed; inf without noise.
        delta: Of the claim, and of the lower bounds.
        confidence: Of each lower bound by itself.
        num_steps: Steps that were taken.
        canaries: Results by kind of canary.
    """

    epsilon: float
    delta: float
    confidence: float
    num_steps: int
    canaries: Mapping[str, CanaryResult]

    @property
    def is_refuted(self) -> bool:
        """Whether a lower bound passes the claim: a defect, or an unlucky audit."""
        return any(
            max(one.epsilon_lower_bound, one.epsilon_if_gaussian) > self.epsilon
            for one in self.canaries.values()
        )


def examine(
    scores: Scores, is_in: Coins, *, epsilon: float, delta: float, confidence: float
) -> CanaryResult:
    """Guesses coins, as many as the claim suggests, and bounds epsilon.

    Args:
        scores: (m,) by canary, computed without looking at the coins; high means in.
        is_in: (m,) the coins, m >= 1.
        epsilon: Claimed upper bound; inf where nothing is claimed.
        delta: Claimed, in (0, 1).
        confidence: Of each lower bound, in (0, 1).

    Raises:
        ConfigError: `delta` or `confidence` is out of range.
    """
    stated = {"delta": delta, "confidence": confidence}
    number = guesses_to_make(len(is_in), epsilon=epsilon, **stated)
    guesses = guess(scores, is_in, num_guesses=number)
    return CanaryResult(
        is_in=is_in,
        scores=scores,
        guesses=guesses,
        epsilon_lower_bound=epsilon_lower_bound(guesses, **stated),
        epsilon_if_gaussian=epsilon_if_gaussian(guesses, **stated),
    )


def guess(scores: Scores, is_in: Coins, *, num_guesses: int) -> Guesses:
    """Guesses that the highest scores are in and the lowest are out, and counts.

    Args:
        scores: (m,) by canary, computed without looking at the coins; high means in.
        is_in: (m,) the coins.
        num_guesses: Coins to guess, in [0, m]; half of them as in.
    """
    order = np.argsort(scores, kind="stable")
    lowest = order[: num_guesses // 2]
    highest = order[len(order) - (num_guesses - len(lowest)) :]
    return Guesses(
        num_canaries=len(scores),
        num_guesses=num_guesses,
        num_correct=int(is_in[highest].sum() + (~is_in[lowest]).sum()),
    )


def p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    r"""Bounds the chance of so many right guesses under (epsilon, delta)-DP.

    $P[V \ge v] \le f(v) + 2 m \delta \max_i (f(v - i) - f(v)) / i$, with f(v) the
    probability that Binomial(r, $e^\epsilon / (1 + e^\epsilon)$) is at least v, of r
    guesses and m canaries. It holds for every way of guessing, and for canaries that
    are added or removed, which is the neighbourhood of our accountant.

    Args:
        guesses: Of one run.
        epsilon: Claimed, >= 0.
        delta: Claimed, in (0, 1).

    Returns:
        In [0, 1]; below 1 - confidence it refutes the claim.

    Source: Steinke, Nasr and Jagielski 2023, section 5 and appendix D
    (arXiv:2305.08846).
    """
    right, made = guesses.num_correct, guesses.num_guesses
    accuracy = expit(epsilon)  # of randomised response, the best of all guessers
    reached = float(binom.sf(right - 1, made, accuracy))
    missed_by = np.arange(1, right + 1)
    just_missed = np.cumsum(binom.pmf(right - missed_by, made, accuracy))
    slope = float((just_missed / missed_by).max(initial=0.0))
    return min(1.0, reached + 2 * guesses.num_canaries * delta * slope)


def epsilon_lower_bound(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """Returns the largest epsilon that the guesses refute, whatever was audited.

    Guarantees:
        If the run is (epsilon, delta)-DP for add-or-remove-one neighbours, the
        returned value is at most epsilon with probability `confidence` or more.

    Args:
        guesses: Of one run.
        delta: Claimed, in (0, 1).
        confidence: In (0, 1).

    Returns:
        Epsilon >= 0; 0 where nothing is refuted.

    Raises:
        ConfigError: `delta` or `confidence` is out of range.

    Source: Steinke, Nasr and Jagielski 2023, appendix D (arXiv:2305.08846), which
    computes 0.673 for this example:

    >>> guesses = Guesses(num_canaries=1000, num_guesses=100, num_correct=75)
    >>> round(epsilon_lower_bound(guesses, delta=1e-4, confidence=0.95), 3)
    0.673
    """
    check_delta(delta)
    check_confidence(confidence)

    def is_refuted(epsilon: float) -> bool:
        return p_value(guesses, epsilon=epsilon, delta=delta) < 1 - confidence

    return _last_refuted(is_refuted, _MAX_EPSILON)


def epsilon_if_gaussian(guesses: Guesses, *, delta: float, confidence: float) -> float:
    r"""Returns a lower bound that takes the mechanism for a Gaussian one.

    A Gaussian mechanism is known at all its (epsilon, delta) at once, which right
    guesses refute more easily than one of them. Many steps of DP-SGD are nearly a
    Gaussian mechanism, so this bound is the sharper alarm; what it refutes is
    $\mu$-GDP, and the epsilon is that of $\mu$ at delta.

    Guarantees:
        If the run is $\mu$-GDP, the returned value is at most the epsilon of $\mu$
        with probability `confidence` or more.

    Args:
        guesses: Of one run.
        delta: At which epsilon is stated, in (0, 1).
        confidence: In (0, 1).

    Returns:
        Epsilon >= 0; 0 where nothing is refuted.

    Raises:
        ConfigError: `delta` or `confidence` is out of range.

    Source: Mahloujifar, Melis and Chaudhuri 2024, the recursion for guesses with
    abstentions (arXiv:2410.22235).
    """
    check_delta(delta)
    check_confidence(confidence)

    def is_refuted(mu: float) -> bool:
        return _refutes_gaussian(guesses, mu, 1 - confidence)

    return gaussian_epsilon(_last_refuted(is_refuted, _MAX_MU), delta)


def _refutes_gaussian(guesses: Guesses, mu: float, significance: float) -> bool:
    """Tells whether so many right guesses refute mu-GDP.

    Were the probability of them above `significance`, those of v - 1, v - 2, ... right
    guesses would have to rise so fast that all together would pass 1.
    """
    made, right = guesses.num_guesses, guesses.num_correct
    share = 1 / guesses.num_canaries
    correct, wrong = right * share * significance, (made - right) * share * significance
    for count in range(right - 1, -1, -1):
        if correct + wrong > made * share:
            return True
        needed = max(wrong, float(ndtr(ndtri(min(correct, 1.0)) - mu)))
        correct += count / (made - count) * (needed - wrong)
        wrong = needed
    return correct + wrong > made * share


def _last_refuted(is_refuted: Callable[[float], bool], largest: float) -> float:
    """Returns the end of the refuted values, from below; 0 if there is none."""
    low, high = 0.0, 1.0
    while is_refuted(high):
        if high >= largest:
            return high
        low, high = high, high + 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low if low > 0 and is_refuted(low) else 0.0


def guesses_to_make(
    num_canaries: int, *, epsilon: float, delta: float, confidence: float
) -> int:
    r"""Returns how many coins to guess, from what is claimed and before the run.

    A few guesses are more often right than many; best is what would show most if the
    run were as private as claimed and no more. The scores are then those of a Gaussian
    mechanism with the claimed epsilon: N(0, 1) without, N($\mu$, 1) with the canary.

    Args:
        num_canaries: Canaries m >= 1.
        epsilon: Claimed; inf where nothing is.
        delta: Claimed, in (0, 1).
        confidence: In (0, 1).

    Returns:
        Even, in [0, m].
    """
    mu = gaussian_mu(epsilon, delta)
    everything = num_canaries - num_canaries % 2
    if mu >= _MAX_MU:
        return everything
    best, most_shown = everything, 0.0
    for threshold in np.linspace(mu / 2, mu + 3, _TRIED_THRESHOLDS):
        caught, mistaken = ndtr(mu - threshold), ndtr(-threshold)
        made = min(everything, 2 * round(num_canaries * (caught + mistaken) / 2))
        right = math.floor(made * caught / (caught + mistaken))
        expected = Guesses(
            num_canaries=num_canaries, num_guesses=made, num_correct=right
        )
        shown = epsilon_lower_bound(expected, delta=delta, confidence=confidence)
        if shown > most_shown:
            best, most_shown = made, shown
    return best


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Returns the mu of the Gaussian mechanism with a given epsilon at a delta."""
    if gaussian_epsilon(_MAX_MU, delta) <= epsilon:
        return _MAX_MU
    return solved(lambda mu: epsilon - gaussian_epsilon(mu, delta), _MAX_MU)
