r"""Gaussian noise rounded to whole numbers, exactly, from the operating system's bits.

A number is drawn as $X = \pm \mathrm{round}(-\sigma \Phi^{-1}(V))$ with V uniform in
(0, 1/2). The first 63 bits of V place it in an interval. If float64, with its error
bounded, sends the whole interval to one whole number, that is X. If not, about once in
$10^5$ draws, V gets more bits, and Phi is evaluated to as many digits as it takes. So X
has the distribution of a rounded Gaussian itself: no bits of it are those of a formula
in float64, which attacks on the low bits of noise read.

Source: interval refining, Haney et al. 2022 (arXiv:2207.13793); that one precision
suffices almost always, and more are tried where it does not: Ziv 1991, "Fast evaluation
of elementary mathematical functions with correctly rounded last bit", ACM TOMS 17(3).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import mpmath
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from dpsgd.errors import fault

__all__ = ["MAX_STD", "magnitudes", "rounded_gaussian"]

MAX_STD: Final = 2.0**46  # a draw of 2**7 standard deviations is still exact
_CHUNK: Final = 1 << 16  # temporaries stay in cache
_WORD_BYTES: Final = 8
# Relative error of ndtri that is allowed for. The largest of 45,000 that were compared
# with 120 binary digits, over the whole range, was 2**-50.1.
_NDTRI_ERROR: Final = 2.0**-44
# Of the argument: its rounding, times v / phi(z), which is at most 1.26.
_ARGUMENT_ERROR: Final = 2.0**-52
_HALF_INTERVAL: Final = 0.65  # half an interval in units of its place m, times 1.26
_LEAST_PLACE: Final = 2.0**20  # below it, too few bits for the bounds above
_SPARE_BITS: Final = 64


def rounded_gaussian(
    count: int, std: float, *, num_threads: int = 1
) -> NDArray[np.float64]:
    """Draws independent N(0, std^2), each rounded to the nearest whole number.

    Guarantees:
        Exact if the operating system's bits are, and ndtri is as near as allowed for:
        every value has the probability that a real Gaussian rounds to it, to 2**-120.
        No value is cut off. Nothing can repeat a draw: there is no seed and no state.

    Args:
        count: Numbers to draw, >= 0.
        std: Standard deviation in units of 1, in [0, 2**46].
        num_threads: Threads that draw, >= 1; speed only.

    Returns:
        (count,) whole numbers, exact in float64.

    Raises:
        ValueError: `std` is out of range.
    """
    if not 0 <= std <= MAX_STD:
        rule = "must be in [0, 2**46]"
        raise ValueError(fault("std", std, rule, "take a coarser grid"))
    if std == 0:
        return np.zeros(count)
    starts = range(0, count, _CHUNK)
    sizes = [min(_CHUNK, count - start) for start in starts]
    with ThreadPoolExecutor(num_threads) as pool:
        parts = list(pool.map(lambda size: _draw(size, std), sizes))
    return np.concatenate([np.empty(0), *parts])


def _draw(count: int, std: float) -> NDArray[np.float64]:
    """Draws a few numbers."""
    words = np.frombuffer(os.urandom(_WORD_BYTES * count), np.uint64)
    signs = 1.0 - 2.0 * (words & np.uint64(1))
    places = words >> np.uint64(1)  # V is in [place, place + 1) * 2**-64
    whole, is_sure = magnitudes(places, std)
    for index in np.flatnonzero(~is_sure):
        whole[index] = _exact_magnitude(int(places[index]), std)
    return whole * signs


def magnitudes(
    places: NDArray[np.uint64], std: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns what 63 bits of each draw make of it, and whether they suffice.

    Args:
        places: Of a draw in (0, 1/2): V is in [place, place + 1) * 2**-64.
        std: Standard deviation in units of 1, in (0, 2**46].

    Returns:
        Rounded magnitudes, >= 0, and True where the whole interval rounds to it.
        Elsewhere a magnitude is a guess, and the draw needs more bits.
    """
    middle = places.astype(np.float64) + 0.5
    normals = -ndtri(middle * 2.0**-64)
    values = std * normals
    whole = np.rint(values)
    error = std * (normals * _NDTRI_ERROR + _ARGUMENT_ERROR + _HALF_INTERVAL / middle)
    is_sure = (np.abs(values - whole) + error < 0.5) & (middle > _LEAST_PLACE)
    return whole, is_sure


def _exact_magnitude(place: int, std: float) -> int:
    """Rounds the magnitude of one draw, giving V as many more bits as it takes."""
    num_bits = 8 * _WORD_BYTES
    while True:
        more = int.from_bytes(os.urandom(_WORD_BYTES))
        place, num_bits = place << 8 * _WORD_BYTES | more, num_bits + 8 * _WORD_BYTES
        with mpmath.workprec(num_bits + _SPARE_BITS):
            whole = _settled(place, num_bits, std)
        if whole is not None:
            return whole


def _settled(place: int, num_bits: int, std: float) -> int | None:
    """Returns the number that a whole interval rounds to, or None if there is none."""
    scale = mpmath.mpf(2) ** num_bits
    guess = -std * float(ndtri(float((place + mpmath.mpf(0.5)) / scale)))
    whole = round(guess)
    while True:
        # V falls as the magnitude grows: it lies between the tails of whole +- 1/2.
        least = scale * _tail((whole + mpmath.mpf(0.5)) / std)
        most = scale * _tail((whole - mpmath.mpf(0.5)) / std) if whole else scale / 2
        if least <= place and place + 1 <= most:
            return whole
        if place >= most:
            whole -= 1
        elif place + 1 <= least:
            whole += 1
        else:
            return None


def _tail(value: mpmath.mpf) -> mpmath.mpf:
    """Returns the probability that a standard normal is above a value."""
    return mpmath.erfc(value / mpmath.sqrt(2)) / 2
