"""The noise, or the number of steps, that a target epsilon allows: never less noise.

The estimator finds the answer in a tenth of a second; the accountant then certifies
it, and moves it to the safe side until its certified upper bound is within the target.
"""

import math
from collections.abc import Callable
from typing import Final

from scipy.optimize import brentq

from dpsgd.errors import ConfigError, fault
from dpsgd.privacy.accountant import Accountant
from dpsgd.privacy.bounds import quick_epsilon
from dpsgd.privacy.estimator import estimate_delta, likely_epsilon
from dpsgd.privacy.mechanism import (
    Phase,
    check_delta,
    check_noise_multiplier,
    check_num_steps,
    check_sample_rate,
    check_target_epsilon,
)

__all__ = ["calibrate_noise_multiplier", "calibrate_num_steps"]

_DIGITS: Final = 7
_CERTIFICATIONS: Final = 4
_SEARCHES: Final = 8
_TOLERANCE: Final = 1e-3
_STRIDE: Final = 0.05
_NUDGE: Final = 2e-6
_MAX_STEPS: Final = 10_000_000
_MIN_NOISE_MULTIPLIER: Final = 0.01
_STEP_TOLERANCE: Final = 5e-4


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    sample_rate: float,
    num_steps: int,
    delta: float,
    accountant: Accountant,
) -> float:
    """Returns the least noise multiplier that is certified to keep a target epsilon.

    Guarantees:
        accountant.epsilon(...).upper <= target_epsilon was asked of the value.

    Args:
        target_epsilon: Epsilon not to pass, > 0, finite.
        sample_rate: Poisson inclusion probability q, in (0, 1].
        num_steps: Steps T, >= 0.
        delta: In (0, 1).
        accountant: Certifies; the closer its bounds, the less the noise.

    Returns:
        Noise >= 0.01, rounded up to 7 digits; 0 if there are no steps.

    Raises:
        ConfigError: An argument is out of range.
    """
    check_target_epsilon(target_epsilon)
    check_sample_rate(sample_rate)
    check_num_steps(num_steps)
    check_delta(delta)
    if num_steps == 0:
        return 0.0

    def phases(noise_multiplier: float) -> list[Phase]:
        return [Phase(sample_rate, noise_multiplier, num_steps)]

    def certified(noise_multiplier: float) -> float:
        return accountant.epsilon(phases(noise_multiplier), delta).upper

    safe = _quick_noise_multiplier(phases, target_epsilon, delta)
    aim = target_epsilon - accountant.slack(phases(safe), delta)
    for _ in range(_CERTIFICATIONS):
        found = _estimated_noise_multiplier(phases, aim, delta, safe)
        if found is None:
            break
        upper = certified(found)
        if upper <= target_epsilon:
            return found
        # At least so far that the digits of the noise change.
        aim -= max(1.1 * (upper - target_epsilon), _NUDGE * target_epsilon)
    return _searched_noise_multiplier(certified, target_epsilon, safe)


def calibrate_num_steps(
    *,
    target_epsilon: float,
    sample_rate: float,
    noise_multiplier: float,
    delta: float,
    accountant: Accountant,
) -> int:
    """Returns the most steps that are certified to keep a target epsilon.

    Guarantees:
        accountant.epsilon(...).upper <= target_epsilon after the steps returned, and
        > target_epsilon after one more, or, from 4,000 steps on, after 0.05 % more.

    Args:
        target_epsilon: Epsilon not to pass, > 0, finite.
        sample_rate: Poisson inclusion probability q, in (0, 1].
        noise_multiplier: Noise over l2_sensitivity, >= 0, finite.
        delta: In (0, 1).
        accountant: Certifies.

    Returns:
        Number of steps >= 0; 0 if not even one step fits.

    Raises:
        ConfigError: An argument is out of range, or more than ten million steps fit.
    """
    check_target_epsilon(target_epsilon)
    check_sample_rate(sample_rate)
    check_noise_multiplier(noise_multiplier)
    check_delta(delta)

    def phases(num_steps: int) -> list[Phase]:
        return [Phase(sample_rate, noise_multiplier, num_steps)]

    def certified(num_steps: int) -> float:
        return accountant.epsilon(phases(num_steps), delta).upper

    def expected(num_steps: int) -> float:
        return likely_epsilon(phases(num_steps), delta)

    rough = _last_within(expected, target_epsilon)
    if rough == _MAX_STEPS:
        rule = f"lets more than {_MAX_STEPS} steps pass within the target epsilon"
        raise ConfigError(
            fault("noise_multiplier", noise_multiplier, rule, "give num_steps")
        )
    slack = accountant.slack(phases(rough), delta)
    start = _last_within(expected, target_epsilon - slack)
    return _most_certified_steps(certified, target_epsilon, start)


def _quick_noise_multiplier(
    phases: Callable[[float], list[Phase]], target_epsilon: float, delta: float
) -> float:
    """Returns a sufficient noise multiplier, about 5 % too large, in milliseconds."""

    def fits(log_sigma: float) -> bool:
        return quick_epsilon(phases(math.exp(log_sigma)), delta) <= target_epsilon

    high = 0.0
    while not fits(high):
        high += 1.0
    low = high - 1.0
    while fits(low):
        if low < math.log(_MIN_NOISE_MULTIPLIER):
            return _MIN_NOISE_MULTIPLIER
        low, high = low - 1.0, low
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.exp(high)


def _estimated_noise_multiplier(
    phases: Callable[[float], list[Phase]], epsilon: float, delta: float, near: float
) -> float | None:
    """Solves delta(epsilon; sigma) = delta near a guess; None if it cannot."""

    def excess(log_sigma: float) -> float:
        found = estimate_delta(phases(math.exp(log_sigma)), epsilon)
        if found is None:
            raise ArithmeticError
        return math.log(max(found, 1e-300) / delta)

    if epsilon <= 0:
        return None
    try:
        low, high = _bracketed(excess, math.log(near))
        return _rounded_up(math.exp(brentq(excess, low, high, xtol=1e-8)))
    except ArithmeticError:
        return None


def _bracketed(excess: Callable[[float], float], start: float) -> tuple[float, float]:
    """Returns two points between which a falling function passes 0."""
    up = excess(start) > 0
    stride = _STRIDE if up else -_STRIDE
    near, far = start, start + stride
    while (excess(far) > 0) == up:
        stride *= 2
        near, far = far, far + stride
    return min(near, far), max(near, far)


def _rounded_up(value: float) -> float:
    """Returns the value rounded up to `_DIGITS` significant digits."""
    places = _DIGITS - 1 - math.floor(math.log10(value))
    return round(math.ceil(value * 10.0**places) / 10.0**places, places)


def _searched_noise_multiplier(
    certified: Callable[[float], float], target_epsilon: float, safe: float
) -> float:
    """Returns a certified noise multiplier without an estimate to aim by."""
    good = _rounded_up(safe)
    while (upper := certified(good)) > target_epsilon:
        good = _rounded_up(1.1 * good)
    bad, slope = _MIN_NOISE_MULTIPLIER, 1.0
    for _ in range(_SEARCHES):
        if upper > (1 - 2 * _TOLERANCE) * target_epsilon or good <= bad * (1 + 1e-4):
            break
        # epsilon falls like sigma^-slope, which each answer corrects.
        ratio = max(upper, 0.3 * target_epsilon) / ((1 - _TOLERANCE) * target_epsilon)
        guess = _rounded_up(good * ratio ** (1 / slope))
        if not bad < guess < good:
            guess = _rounded_up(math.sqrt(max(bad, good / 4) * good))
        answer = certified(guess)
        if 0 < upper < answer < math.inf:
            slope = max(0.3, math.log(answer / upper) / math.log(good / guess))
        if answer <= target_epsilon:
            good, upper = guess, answer
        else:
            bad = guess
    return good


def _last_within(expected: Callable[[int], float], epsilon: float) -> int:
    """Returns the most steps, up to the cap, whose expected epsilon is within one."""
    low, high = 0, 1
    while expected(high) <= epsilon:
        if high == _MAX_STEPS:
            return high
        low, high = high, min(2 * high, _MAX_STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if expected(middle) <= epsilon else (low, middle)
    return low


def _most_certified_steps(
    certified: Callable[[int], float], target_epsilon: float, start: int
) -> int:
    """Returns the most certified steps, searching outwards from a good guess."""
    good, bad = 0, _MAX_STEPS
    guess, stride = start, 1
    while bad - good > max(1, int(_STEP_TOLERANCE / 2 * good)):
        guess = min(max(guess, good + 1), bad - 1)
        if certified(guess) <= target_epsilon:
            good = guess
        else:
            bad = guess
        # Outwards in growing strides while one side is open, then by halves.
        stride = max(2 * stride, int(_STEP_TOLERANCE / 2 * guess))
        if bad == _MAX_STEPS:
            guess = good + stride
        elif good == 0:
            guess = bad - stride
        else:
            guess = (good + bad) // 2
    return good
