r"""The privacy loss of one step as a distribution, cut where it no longer matters.

With noise x, the loss of removing an example is log r(x) under the mixture
(1 - q) N(0, sigma^2) + q N(1, sigma^2), that of adding one is -log r(x) under
N(0, sigma^2), where r(x) = 1 - q + q exp((2 x - 1) / (2 sigma^2)); see `bounds`.
"""

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, roots_legendre

from dpsgd.privacy.bounds import Direction, MeshError
from dpsgd.privacy.mechanism import Phase

__all__ = ["StepLoss"]

Real = NDArray[np.floating]

_POINTS: Final = 8
_FEW_POINTS: Final = 3
_NARROW: Final = 1 / 32
_LARGE: Final = 30.0
_MAX_PANELS: Final = 4_000


@dataclass(frozen=True)
class StepLoss:
    """One step's privacy loss at quadrature points.

    Attributes:
        phase: The step; its number of steps is not used.
        direction: Whether the example is removed or added.
        panels: (P + 1,) ends of the panels of the quadrature, in the noise x.
        losses: (Q,) losses at the quadrature points.
        masses: (Q,) their probabilities > 0, to a relative 1e-11.
        above: Probability of losses above all of these.
        below: Probability of losses below all of these.
    """

    phase: Phase
    direction: Direction
    panels: Real
    losses: Real
    masses: Real
    above: float
    below: float

    @classmethod
    def of(cls, phase: Phase, direction: Direction, tail: float) -> Self:
        """Describes one step of a phase.

        Args:
            phase: With 0 < q <= 1 and noise_multiplier > 0.
            direction: Whether the example is removed or added.
            tail: About the probability to leave out at each end, in (0, 0.1).

        Raises:
            MeshError: The noise multiplier is below about 0.03.
        """
        q, sigma = phase.sample_rate, phase.noise_multiplier
        reach = -float(ndtri(tail)) * sigma
        low, high, removed = -reach, reach, direction == "remove"
        if removed:
            low += q == 1
            high = max(high, 1 - float(ndtri(min(tail / q, 0.1))) * sigma)
        # Narrow against the bell and, for q < 1, against the bend of log r.
        width = sigma / 2 if q == 1 else min(sigma, sigma**2) / 2
        count = math.ceil((high - low) / width)
        if count > _MAX_PANELS:
            raise MeshError(f"{count} panels")
        panels = np.linspace(low, high, count + 1)
        losses, masses = _quadrature(phase, direction, panels)
        losses, masses = losses[masses > 0], masses[masses > 0]
        left, right = float(ndtr(low / sigma)), float(ndtr(-high / sigma))
        if removed:
            left = (1 - q) * left + q * float(ndtr((low - 1) / sigma))
            right = (1 - q) * right + q * float(ndtr((1 - high) / sigma))
        below, above = (left, right) if removed else (right, left)
        return cls(phase, direction, panels, losses, masses, above, below)

    def log_moment(self, order: float) -> float:
        """Returns log E[exp(order L)] of the losses that were not cut.

        Args:
            order: Any finite number.
        """
        tilted = order * self.losses
        top = float(tilted.max())
        return top + math.log(float(self.masses @ np.exp(tilted - top)))

    def on_lattice(self, width: float, lowest: int) -> tuple[int, Real]:
        """Splits the losses between the nodes of a lattice.

        Guarantees:
            The pair of distributions on the nodes reveals no less than the step does,
            if `above` is counted as an infinite loss besides.

        Args:
            width: Distance h of the nodes k h, > 0.
            lowest: Losses below node `lowest` are moved up to it.

        Returns:
            Number k of the first node, and (K,) the masses of nodes k, k + 1, ...
        """
        last = math.floor(float(self.losses.max()) / width) + 1
        first = max(lowest, math.floor(float(self.losses.min()) / width))
        # Panels end where cells do, so that the split is smooth on each.
        bounds = _noise(self.phase, self.direction, width * np.arange(first, last + 1))
        bounds = bounds[(bounds > self.panels[0]) & (bounds < self.panels[-1])]
        panels = np.union1d(self.panels, bounds)
        losses, masses = _quadrature(self.phase, self.direction, panels)
        losses = np.maximum(losses, first * width)
        cells = np.clip(np.floor(losses / width), first, last - 1)
        upper = np.expm1(cells * width - losses) / math.expm1(-width)
        upper = np.clip(upper, 0.0, 1.0) * masses
        index = cells.astype(np.int64) - first
        split = np.zeros(last - first + 1)
        split += np.bincount(index, masses - upper, split.size)
        split += np.bincount(index + 1, upper, split.size)
        split[0] += self.below
        return first, split


def _quadrature(phase: Phase, direction: Direction, ends: Real) -> tuple[Real, Real]:
    """Returns losses and probabilities at Gauss-Legendre points of panels."""
    q, sigma = phase.sample_rate, phase.noise_multiplier
    x, weights = _points(ends)
    masses = np.exp(-((x / sigma) ** 2) / 2)
    if direction == "remove":
        masses = (1 - q) * masses + q * np.exp(-(((x - 1) / sigma) ** 2) / 2)
    masses *= weights / (sigma * math.sqrt(2 * math.pi))
    log_ratio = _log_ratio(phase, x)
    return (log_ratio if direction == "remove" else -log_ratio), masses


def _points(ends: Real) -> tuple[Real, Real]:
    """Returns points and weights on panels, fewer where a lattice cut them narrow."""
    half = (ends[1:] - ends[:-1]) / 2
    middle = ends[:-1] + half
    narrow = half < _NARROW * half.max()
    points, weights = [], []
    for chosen, number in ((~narrow, _POINTS), (narrow, _FEW_POINTS)):
        x, weight = roots_legendre(number)
        points.append((middle[chosen, None] + half[chosen, None] * x).ravel())
        weights.append((half[chosen, None] * weight).ravel())
    return np.concatenate(points), np.concatenate(weights)


def _log_ratio(phase: Phase, x: Real) -> Real:
    """Returns log r(x), to a relative error near rounding."""
    q = phase.sample_rate
    y = (2 * x - 1) / (2 * phase.noise_multiplier**2)
    if q == 1:
        return np.asarray(y)
    near = np.log1p(q * np.expm1(np.minimum(y, _LARGE)))
    far = np.logaddexp(math.log1p(-q), math.log(q) + y)
    return np.asarray(np.where(y < _LARGE, near, far))


def _noise(phase: Phase, direction: Direction, losses: Real) -> Real:
    """Returns the noise at which a loss is taken, of those losses that there are."""
    q = phase.sample_rate
    y = losses if direction == "remove" else -losses
    if q < 1:
        y = y[y > math.log1p(-q)]
        small, large = np.minimum(y, 1.0), np.maximum(y, 1.0)
        near = np.log1p(np.maximum(np.expm1(small) / q, -1 + 1e-15))
        far = large - math.log(q) + np.log1p(-(1 - q) * np.exp(-large))
        y = np.where(y < 1, near, far)
    return np.asarray(phase.noise_multiplier**2 * y + 0.5)
