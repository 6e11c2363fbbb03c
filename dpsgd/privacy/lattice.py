r"""A sound bound on epsilon from the whole distribution of the privacy loss.

The loss L of a run is a sum of independent losses, one a step. Each is moved to the
nodes of a lattice of width h, the sum is composed by a fast Fourier transform, and

    delta(epsilon) = E[max(0, 1 - exp(epsilon - L))]

is read off. Between two nodes a loss is split so that both distributions it compares
keep their mass: who forgets which node was drawn has the true pair back, so that the
lattice reveals no less than the steps do. Its error falls like h^2. Before composing,
masses are tilted by exp(c L), which moves the bulk of the sum to where delta comes
from: delta is found to a small *relative* error, however small it is.

Source: Koskela, Jalko and Honkela 2020 (arXiv:1906.03049); the split is that of
Doroshenko et al. 2022, "Connect the Dots" (arXiv:2207.04380).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from scipy.fft import irfft, rfft
from scipy.optimize import minimize_scalar

from dpsgd.privacy.bounds import (
    Composition,
    Direction,
    MeshError,
    log_factor,
    renyi_log_delta,
)
from dpsgd.privacy.losses import Real, StepLoss
from dpsgd.privacy.mechanism import Phase

__all__ = ["larger_epsilon", "lattice_delta", "lattice_epsilon"]

_FIRST_NODES: Final = 1 << 12
_MAX_NODES: Final = 1 << 20
_NEGLIGIBLE: Final = 3e-5
_MARGIN: Final = 10.0
_TILTS: Final = tuple(2 ** (-k / 2) for k in range(9))
_ORDERS: Final = (1e-6, 600.0)
_UNIT_ROUNDING: Final = 2.0**-53
_LOG_ROUNDING: Final = 1e-12
_LEAST_DELTA: Final = 1e-200
_LOG_OF_LARGEST: Final = 700.0  # a double holds exp(709)


@dataclass(frozen=True)
class _Run:
    """The losses of all steps, before they are composed."""

    steps: tuple[tuple[StepLoss, int], ...]

    @classmethod
    def of(cls, composition: Composition, direction: Direction, delta: float) -> Self:
        """Describes a composition, leaving out a negligible part of delta."""
        phases = list(composition.phases)
        if composition.gaussian_mu > 0:
            phases.append(Phase(1.0, 1 / composition.gaussian_mu, 1))
        tail = _NEGLIGIBLE * delta / sum(phase.num_steps for phase in phases)
        return cls(
            tuple((StepLoss.of(p, direction, tail), p.num_steps) for p in phases)
        )

    @property
    def num_steps(self) -> int:
        """Steps composed."""
        return sum(count for _, count in self.steps)

    @property
    def lost(self) -> float:
        """Bound on the probability that any loss was cut."""
        return sum(count * step.above for step, count in self.steps)

    def log_moment(self, order: float) -> float:
        """Returns log E[exp(order L)] of the sum of the losses."""
        return sum(count * step.log_moment(order) for step, count in self.steps)

    def least(self, objective: Callable[[float], float]) -> tuple[float, float]:
        """Returns the least value of a function of the order, and the order."""
        scale = max(float(np.abs(step.losses).max()) for step, _ in self.steps)
        found = minimize_scalar(
            lambda log_order: objective(math.exp(log_order)),
            bounds=(math.log(_ORDERS[0] / scale), math.log(_ORDERS[1] / scale)),
            method="bounded",
            options={"xatol": 1e-2},
        )
        return float(found.fun), math.exp(found.x)

    def epsilon(self, delta: float) -> float:
        """Returns a sound epsilon as `renyi_epsilon` does, for losses without tails."""

        def objective(order: float) -> float:
            moment = self.log_moment(order) + _LOG_ROUNDING * self.num_steps
            return (moment + log_factor(order) - math.log(delta - self.lost)) / order

        return max(0.0, self.least(objective)[0])

    def reach(self, log_probability: float, tilt: float = 0.0) -> float:
        """Returns a loss that the tilted sum passes with at most a probability."""
        base = self.log_moment(tilt) if tilt else 0.0

        def objective(order: float) -> float:
            return (self.log_moment(tilt + order) - base - log_probability) / order

        return self.least(objective)[0]


@dataclass(frozen=True)
class _Window:
    """The sums of losses that a lattice resolves, and the tilt to compose them with."""

    epsilon: float
    low: float
    length: float
    tilt: float

    @classmethod
    def around(cls, run: _Run, epsilon: float, delta: float) -> "_Window":
        """Returns the shortest window in which rounding stays negligible.

        The transform is cyclic: sums above the window come back at its bottom, where
        they are lost if they do not pass epsilon, and outweigh if they do; sums below
        it come back at its top. The window is so long that all of this is negligible.

        Args:
            run: Losses to be composed.
            epsilon: Near, and not below, the epsilon to be found.
            delta: Near the delta to be found.
        """
        rare = math.log(_NEGLIGIBLE * delta)
        top = max(run.reach(rare), epsilon)
        peak = run.least(lambda c: run.log_moment(c) - c * epsilon + log_factor(c))[1]

        def with_tilt(share: float) -> tuple[float, float, _Window]:
            tilt = share * peak
            scale = run.log_moment(tilt) - tilt * epsilon
            below = min(_MARGIN / tilt, epsilon)
            length = max(top, run.reach(rare - scale, tilt)) - epsilon + below
            length = max(length, -rare / tilt)
            window = _Window(epsilon, epsilon - below, length, tilt)
            blur = scale + math.log(_blur(run, window, _FIRST_NODES << 4))
            return max(blur, rare + math.log(10)), length, window

        return min(map(with_tilt, _TILTS), key=lambda choice: choice[:2])[2]


def _blur(run: _Run, window: _Window, nodes: int) -> float:
    """Bounds what rounding adds to delta, over exp(log E[exp(c (L - epsilon))]).

    The transform is accurate to 8 log2(nodes) roundings in the 2-norm (Higham 2002,
    Theorem 24.2), a power of n multiplies that by n, and Cauchy and Schwarz give the
    error of the sum over nodes that is delta.
    """
    width = window.length / nodes
    ratio = math.exp(-2 * window.tilt * width)
    steps = -math.expm1(-2 * window.tilt * width)
    # Squares of exp(-c x) min(1, x), summed over nodes.
    weights = min(1.0, (width / steps) ** 2 * (1 + ratio)) / steps
    rounding = 8 * math.log2(nodes) * _UNIT_ROUNDING * (run.num_steps + 2)
    return rounding * math.sqrt(weights)


@dataclass(frozen=True)
class _Lattice:
    """The sum of the losses on the nodes of a window.

    Args:
        window: What is resolved.
        losses: (K,) losses at the nodes, rising.
        masses: (K,) tilted probabilities exp(c (loss - epsilon)) / exp(log_scale).
        log_scale: log E[exp(c (L - epsilon))] on the lattice.
        lost: Bound on the probability of losses that are not on the nodes.
        blur: What rounding may add, in the unit of `masses`.
    """

    window: _Window
    losses: Real
    masses: Real
    log_scale: float
    lost: float
    blur: float

    @classmethod
    def of(cls, run: _Run, window: _Window, nodes: int) -> Self:
        """Composes the losses of a run.

        Args:
            run: Losses to be composed.
            window: Where they are resolved.
            nodes: Number of nodes, even.
        """
        width = window.length / nodes
        spectrum = np.ones(nodes // 2 + 1, np.complex128)
        top = window.low + window.length
        order = run.least(lambda b: run.log_moment(b) - b * top)[1]
        log_scale, log_above = -window.tilt * window.epsilon, -order * top
        for step, count in run.steps:
            first, masses = step.on_lattice(width, -nodes)
            index = np.arange(first, first + masses.size)
            log_above += count * _log_sum(masses, order * width * index)
            log_mean = _log_sum(masses, window.tilt * width * index)
            log_scale += count * log_mean
            tilted = masses * np.exp(window.tilt * width * index - log_mean)
            spectrum *= rfft(np.bincount(index % nodes, tilted, nodes)) ** count
        index = math.ceil(window.low / width) + np.arange(nodes)
        return cls(
            window,
            width * index,
            irfft(spectrum, nodes)[index % nodes],
            log_scale,
            run.lost + math.exp(min(0.0, log_above)),
            _blur(run, window, nodes),
        )

    def delta(self, epsilon: float) -> float:
        """Returns a sound delta at an epsilon that is not below the window."""
        first = int(np.searchsorted(self.losses, epsilon))
        x = self.losses[first:] - epsilon
        tilt = self.window.tilt
        terms = self.masses[first:] * np.exp(-tilt * x) * -np.expm1(-x)
        scale = self.log_scale - tilt * (epsilon - self.window.epsilon)
        above = float(terms.sum()) + self.blur
        if above == 0:
            return self.lost
        log_above = scale + math.log(above)
        too_large = log_above > _LOG_OF_LARGEST
        return self.lost + (math.inf if too_large else math.exp(log_above))

    def epsilon(self, delta: float) -> float:
        """Returns a sound epsilon >= 0, at least the bottom of the window."""
        low = int(np.searchsorted(self.losses, 0.0))
        high = self.losses.size - 1
        if self.delta(max(0.0, self.losses[low])) <= delta:
            return max(0.0, float(self.losses[low]))
        if self.delta(self.losses[high]) > delta:
            return math.inf
        while high - low > 1:
            middle = (low + high) // 2
            if self.delta(self.losses[middle]) > delta:
                low = middle
            else:
                high = middle
        # Between nodes delta is linear in exp(epsilon), but for the convex blur.
        start, left = self.losses[low], self.delta(self.losses[low])
        if left == math.inf:
            return float(self.losses[high])
        share = (left - delta) / (left - self.delta(self.losses[high]))
        return float(start + math.log1p(share * math.expm1(self.losses[high] - start)))


def _log_sum(masses: Real, exponents: Real) -> float:
    """Returns log of the sum of masses times exp(exponents)."""
    top = float(exponents.max())
    return top + math.log(float(masses @ np.exp(exponents - top)))


def lattice_epsilon(
    composition: Composition,
    delta: float,
    direction: Direction,
    *,
    tolerance: float = 1e-4,
    enough: float = 0.0,
) -> float:
    """Returns a sound epsilon, about `tolerance` above the smallest one.

    Guarantees:
        Never below the smallest epsilon of its direction, whatever the tolerance.

    Args:
        composition: Steps composed, at least one, without infinite terms.
        delta: In [1e-200, 1).
        direction: Whether the example is removed or added.
        tolerance: Refined until that lowers epsilon by less, relatively.
        enough: Not refined any more once epsilon is at most this.

    Returns:
        Epsilon >= 0, in hundredths of a second, or tenths for a tiny q: at most 0.43 s,
        both directions together, in benchmarks/results/accountants.md.

    Raises:
        MeshError: A noise multiplier is below about 0.03.
    """
    run = _Run.of(composition, direction, delta)

    def around(guess: float) -> Callable[[int], float]:
        window = _Window.around(run, guess, delta)
        return lambda nodes: _Lattice.of(run, window, nodes).epsilon(delta)

    return _refined(
        around, run.epsilon(delta), far=0.8, tolerance=tolerance, enough=enough
    )


def larger_epsilon(
    composition: Composition,
    delta: float,
    *,
    tolerance: float,
    removal: float | None = None,
) -> float:
    """Returns a sound epsilon for removing as well as adding an example.

    Args:
        composition: Steps composed, at least one, without infinite terms.
        delta: In [1e-200, 1).
        tolerance: As that of `lattice_epsilon`.
        removal: A sound epsilon for removal; None has it computed.

    Returns:
        Epsilon >= 0, the larger of the two; inf if a noise multiplier is too small.
    """
    try:
        if removal is None:
            removal = lattice_epsilon(composition, delta, "remove", tolerance=tolerance)
        addition = lattice_epsilon(
            composition, delta, "add", tolerance=tolerance, enough=removal
        )
    except MeshError:
        return math.inf
    return max(removal, addition)


def lattice_delta(
    composition: Composition,
    epsilon: float,
    direction: Direction,
    *,
    tolerance: float = 1e-3,
    enough: float = 0.0,
) -> float:
    """Returns a sound delta, about `tolerance` above the smallest one.

    Guarantees:
        Never below the smallest delta of its direction, whatever the tolerance.

    Args:
        composition: Steps composed, at least one, without infinite terms.
        epsilon: >= 0, finite.
        direction: Whether the example is removed or added.
        tolerance: Refined until that lowers delta by less, relatively.
        enough: Not refined any more once delta is at most this.

    Returns:
        Delta in [0, 1]; of one below 1e-200 no more than that is said.

    Raises:
        MeshError: A noise multiplier is below about 0.03.
    """

    def around(guess: float) -> Callable[[int], float]:
        run = _Run.of(composition, direction, guess)
        window = _Window.around(run, epsilon, guess)
        return lambda nodes: _Lattice.of(run, window, nodes).delta(epsilon)

    start = math.exp(renyi_log_delta(composition, epsilon, direction)[0])
    return _refined(
        around, start, far=0.1, tolerance=tolerance, enough=max(enough, _LEAST_DELTA)
    )


def _refined(
    around: Callable[[float], Callable[[int], float]],
    start: float,
    *,
    far: float,
    tolerance: float,
    enough: float,
) -> float:
    """Returns the least of bounds on finer and finer lattices.

    Args:
        around: Given a guess, chooses a window, and returns the bound found there with
            a number of nodes.
        start: A bound to begin with, and first guess.
        far: A bound below this share of the guess asks for another window.
        tolerance: Ends when four times the nodes lower the bound by thrice this.
        enough: Ends when the bound is at most this.
    """
    best = guess = start
    previous, nodes = math.inf, _FIRST_NODES
    bound = around(guess) if best > enough else None
    while bound is not None and best > enough and nodes <= _MAX_NODES:
        found = bound(nodes)
        best = min(best, found)
        if found < far * guess:
            guess, bound = found, around(found) if found > enough else None
        elif found > (1 - 3 * tolerance) * previous:
            break
        else:
            previous, nodes = found, 4 * nodes
    return best
