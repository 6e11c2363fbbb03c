"""How sure a share is: an interval for an accuracy on a finite test set."""

import math
from typing import Final

__all__ = ["wilson_interval"]

_Z: Final = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    r"""Returns the 95 % score interval of a binomial proportion.

    Unlike the interval of the normal approximation it never leaves [0, 1] and has
    width at a share of 0 or 1.

    Args:
        share: Share observed, in [0, 1].
        total: Trials, > 0.

    Returns:
        (low, high), each in [0, 1].

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical
    Inference (JASA 22).

    >>> low, high = wilson_interval(0.5, 10)
    >>> round(low, 4), round(high, 4)
    (0.2366, 0.7634)
    """
    weight = _Z**2 / total
    centre = (share + weight / 2) / (1 + weight)
    spread = math.sqrt(share * (1 - share) / total + weight / (4 * total))
    half = _Z * spread / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)
