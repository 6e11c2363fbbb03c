r"""Poisson sampling: which examples a step uses, and how they reach the device.

The privacy guarantee is that of the sampled Gaussian mechanism, so a draw must be the
one its analysis assumes: every example is in or out by its own coin. Shuffled or
fixed-size batches have another, often far weaker, guarantee.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd.errors import ConfigError, DataError, fault
from dpsgd.rng import RandomStreams

__all__ = ["Microbatch", "PoissonSampler", "microbatches"]

# A constant, so that how a draw is made does not depend on num_rows; at this length
# the sums below stay under 2**63 for every num_rows that is accepted.
_GAPS_PER_CHUNK = 1024
_MAX_ROWS = 2**48


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonSampler:
    r"""Draws each step's examples, each independently with the same probability.

    Row i is in the draw of step t with probability q, whatever the other rows, the
    other steps and the number of rows. Instead of one coin a row, the gaps between
    included rows are drawn: they are independent and geometric,
    P(gap >= k) = (1 - q)^k, which floor(E / -log(1 - q)) has for a standard
    exponential E. The work is O(q num_rows). A row is an example, or a user where users
    are the unit of privacy.

    Guarantees:
        Exact up to float64: a row's probability, given all the others, is within
        about 1e-14 of q. (A comparison with float32 uniforms is off by up to 6e-8.)
        A draw is a function of the streams' key and the step alone.
        Prefix-stable: with the same streams, a row added at the end leaves the
        inclusion of every other row as it was, in every step. The neighbour test
        relies on it.
        The size of a draw is random and never cut; an empty draw is legal, and is
        noised, applied and accounted like any other.

    Args:
        num_rows: Rows held, in [0, 2^48]. Sensitive when neighbours differ by adding
            or removing an example, so nothing public may be derived from it.
        sample_rate: q in (0, 1], a public constant: expected_batch_size over the
            declared num_examples, never over `num_rows`.
        streams: The run's random streams; the stream `sampling` is used.

    Raises:
        ConfigError: `sample_rate` is not in (0, 1].
        DataError: `num_rows` is out of range.

    Source: Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1, "Take a random sample
    L_t with sampling probability L/N"; the sampled Gaussian mechanism that is
    accounted is that of Mironov et al. 2019 (arXiv:1908.10530). Gaps: Devroye 1986,
    "Non-Uniform Random Variate Generation", section X.2, geometric distribution.

    >>> streams = RandomStreams.from_seed(0)
    >>> PoissonSampler(num_rows=5, sample_rate=1.0, streams=streams).draw(step=0)
    array([0, 1, 2, 3, 4])
    """

    num_rows: int
    sample_rate: float
    streams: RandomStreams

    def __post_init__(self) -> None:
        if not 0 <= self.num_rows <= _MAX_ROWS:
            rule = "must be in [0, 2**48]"
            raise DataError(fault("num_rows", self.num_rows, rule, "hold fewer rows"))
        if not 0 < self.sample_rate <= 1:
            message = fault(
                "sample_rate",
                self.sample_rate,
                "must be in (0, 1]",
                "set privacy.expected_batch_size between 0 and data.num_examples",
            )
            raise ConfigError(message)

    def draw(self, step: int) -> NDArray[np.int64]:
        """Returns the rows that one step uses.

        Guarantees:
            As stated for the class. The same step always gives the same rows.

        Args:
            step: Step number, >= 0.

        Returns:
            (R,) int64, rising, without repeats, each in [0, num_rows). R is the
            realized batch size: random, sensitive, never a divisor; 0 is possible.
        """
        rng = self.streams.generator("sampling", step)
        rows = []
        last = -1
        while last < self.num_rows:
            chunk = last + np.cumsum(1 + self._gaps(rng))
            rows.append(chunk)
            last = int(chunk[-1])
        drawn = np.concatenate(rows)
        return drawn[drawn < self.num_rows]

    def _gaps(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draws how many rows are left out before each of the next included ones."""
        # log1p keeps the precision of small rates that log(1 - q) loses.
        rate = math.inf if self.sample_rate == 1 else -math.log1p(-self.sample_rate)
        with np.errstate(over="ignore"):  # inf too is a gap past the end
            gaps = rng.standard_exponential(_GAPS_PER_CHUNK) / rate
        # Clipped while still floats: a gap of a tiny rate does not fit an int64.
        return np.minimum(gaps, self.num_rows).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Microbatch:
    """A part of one draw that the device works on in one pass.

    Args:
        rows: (M,) int64 rows of the data set; padding repeats row 0.
        mask: (M,) bool, False where a row is padding and must contribute nothing.
        start: Position in the draw of the first row.
    """

    rows: NDArray[np.int64]
    mask: NDArray[np.bool_]
    start: int


def microbatches(
    draw: NDArray[np.int64], microbatch_size: int, *, padded_to: int | None = None
) -> Iterator[Microbatch]:
    """Splits a draw into parts of one fixed size, the last one padded.

    Guarantees:
        Every row of the draw is in exactly one part with its mask True, in order.
        Nothing is dropped, however large the draw; an empty draw has no parts.

    Args:
        draw: (R,) int64 rows, R >= 0.
        microbatch_size: M >= 1; changes memory and speed only.
        padded_to: The last part has the smallest multiple of this that holds its
            rows, M at most; None pads it to M like the others.

    Yields:
        ceil(R / M) parts. Their number depends on private data; it may steer the
        work but never a released value.

    Raises:
        ConfigError: `microbatch_size` is below 1.

    Source: Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1 sums over the whole lot
    L_t; the split is accumulation only.

    >>> for part in microbatches(np.array([4, 7, 9]), 2):
    ...     print(part.start, part.rows, part.mask)
    0 [4 7] [ True  True]
    2 [9 0] [ True False]
    """
    if microbatch_size < 1:
        message = fault(
            "runtime.microbatch_size",
            microbatch_size,
            "must be at least 1",
            "use auto or a positive number",
        )
        raise ConfigError(message)
    step = padded_to or microbatch_size
    for start in range(0, len(draw), microbatch_size):
        part = draw[start : start + microbatch_size]
        size = min(microbatch_size, math.ceil(len(part) / step) * step)
        rows = np.zeros(size, np.int64)
        rows[: len(part)] = part
        mask = np.arange(size) < len(part)
        yield Microbatch(rows=rows, mask=mask, start=start)
