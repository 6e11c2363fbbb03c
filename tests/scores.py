"""Standard scores: how many standard deviations a statistic lies from what is promised.

Of draws, each score is near N(0, 1) for independent coins of one rate. Of noise, for
independent normals of the promised size.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Inclusion = NDArray[np.bool_]
Noise = NDArray[np.float64]


def marginal_score(included: Inclusion, rate: float) -> float:
    """Standard score of the chi-square of how often each row was drawn."""
    variance = len(included) * rate * (1 - rate)
    chi_square = ((included.sum(0) - len(included) * rate) ** 2 / variance).sum()
    return float((chi_square - included.shape[1]) / np.sqrt(2 * included.shape[1]))


def pairwise_score(included: Inclusion, rate: float) -> float:
    """Standard score of the squared correlations of all pairs of rows."""
    centred = (included - rate) / np.sqrt(rate * (1 - rate))
    correlation = centred.T @ centred / np.sqrt(len(included))
    pairs = correlation[np.triu_indices(included.shape[1], k=1)] ** 2
    return float((pairs.sum() - len(pairs)) / np.sqrt(2 * len(pairs)))


def adjacency_score(included: Inclusion, rate: float) -> float:
    """Standard score of the correlation of neighbouring rows."""
    centred = (included - rate) / np.sqrt(rate * (1 - rate))
    return float((centred[:, 1:] * centred[:, :-1]).sum()) / np.sqrt(
        len(included) * (included.shape[1] - 1)
    )


def step_score(included: Inclusion, rate: float) -> float:
    """Standard score of the correlation of a row with itself one step later."""
    centred = (included - rate) / np.sqrt(rate * (1 - rate))
    return float((centred[1:] * centred[:-1]).sum()) / np.sqrt(
        (len(included) - 1) * included.shape[1]
    )


def mean_size_score(included: Inclusion, rate: float) -> float:
    """Standard score of the mean size of a draw."""
    variance = included.shape[1] * rate * (1 - rate)
    excess = included.sum(1).mean() - included.shape[1] * rate
    return float(excess / np.sqrt(variance / len(included)))


def size_variance_score(included: Inclusion, rate: float) -> float:
    """Standard score of the variance of the size of a draw."""
    variance, excess_kurtosis = stats.binom.stats(included.shape[1], rate, moments="vk")
    spread = variance * np.sqrt((2 + excess_kurtosis) / len(included))
    return float((included.sum(1).var(ddof=1) - variance) / spread)


def noise_score(noise: Noise, std: float) -> float:
    """Standard score of the variance of noise under the promised one."""
    ratio = float((noise**2).mean()) / std**2
    return (ratio - 1) * math.sqrt(len(noise) / 2)


def repetition_score(noise: Noise) -> tuple[float, int]:
    """Largest standard score of the correlation of noise with itself, and its shift.

    Noise that repeats after a shift, in part or as a whole, correlates there.
    """
    size = len(noise)
    spectrum = np.fft.rfft(noise, 2 * size)
    sums = np.fft.irfft(np.abs(spectrum) ** 2)[1 : size // 2 + 1]
    pairs = size - np.arange(1, len(sums) + 1)
    scores = np.abs(sums) / float((noise**2).mean()) / np.sqrt(pairs)
    shift = int(scores.argmax())
    return float(scores[shift]), shift + 1
