"""The third-party prv-accountant, asked only what it can answer, and corrected.

Left alone, the package divides by zero without steps, hangs or asks for terabytes
at tiny noise, raises obscure errors when its quadrature misses the density, and,
when that quadrature is slightly wrong, shifts its bounds by the error of the mean.
Here each question is sized before it is asked, the mean is computed a second time,
and what cannot be answered is None.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy.integrate import IntegrationWarning

from dpsgd.privacy.bounds import Composition, MeshError, mean_loss
from dpsgd.privacy.mechanism import EpsilonBound, Phase

with warnings.catch_warnings():
    # Invalid escapes in the package's docstrings, seen when it is first compiled.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", SyntaxWarning)
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
    from prv_accountant.accountant import compute_safe_domain_size

__all__ = ["Certificate", "affordable_error", "certify", "subsampled_phases"]

_MIN_NOISE_MULTIPLIER: Final = 0.1
_DELTA_SHARES: Final = (1e-3, 1e-2)
_FFT_ROUNDING: Final = 1e-18
_REFUSALS: Final = (ArithmeticError, AssertionError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Certificate:
    """One discretisation, which bounds epsilon for every number of steps up to its own.

    Args:
        package: The package's accountant.
        delta: Delta of the bounds, in (0, 1).
        eps_error: Half width of the bounds, > 0.
        mean_errors: (P,) how much the mean loss of one step of each phase exceeds
            that of its discretisation.
    """

    package: Any
    delta: float
    eps_error: float
    mean_errors: tuple[float, ...]

    def bound(self, counts: Sequence[int]) -> EpsilonBound | None:
        """Returns what is certified after a number of steps of each phase.

        The package aligns the means of the loss and of its discretisation (Gopi, Lee
        and Wutschitz 2021, arXiv:2106.02848). An error in a mean moves all losses,
        and so epsilon, by that much a step: it is added where it widens the bounds.

        Args:
            counts: (P,) steps of each phase, >= 1, at most those discretised.

        Returns:
            Bounds, of which only those on the estimate may be loose; None if the
            package cannot tell, as it may at a delta near its rounding.
        """
        try:
            with _quiet():
                answer = self.package.compute_epsilon(self.delta, list(counts))
        except _REFUSALS:
            return None
        shift = sum(n * e for n, e in zip(counts, self.mean_errors, strict=True))
        lower, estimate, upper = (float(value) for value in answer)
        if not math.isfinite(lower + estimate + upper):
            return None
        lower = max(0.0, lower + min(0.0, shift))
        upper = max(0.0, upper + max(0.0, shift))
        return EpsilonBound(lower, min(max(estimate + shift, lower), upper), upper)


def certify(
    composition: Composition, delta: float, *, eps_error: float, max_nodes: int
) -> Certificate | None:
    """Discretises the privacy loss of a composition.

    Args:
        composition: Steps composed, with at least one subsampled phase.
        delta: In (0, 1).
        eps_error: Wanted half width of the bounds, > 0; the half width is larger
            where it would take more than `max_nodes`.
        max_nodes: Most nodes of the meshes of all phases; each takes about 0.5 kB and
            4 us.

    Returns:
        The certificate, or None where the package fails, or would: noise_multiplier
        below 0.1, or so many steps that rounding would matter at this delta.

    Source: Gopi, Lee and Wutschitz 2021, Theorem 5.5 (arXiv:2106.02848).
    """
    phases = subsampled_phases(composition)
    if min(p.noise_multiplier for p in phases) < _MIN_NOISE_MULTIPLIER:
        return None
    if _FFT_ROUNDING * composition.num_steps > _DELTA_SHARES[1] * delta:
        return None
    for share in _DELTA_SHARES:
        try:
            return _discretise(
                phases, delta, delta * share, eps_error=eps_error, max_nodes=max_nodes
            )
        except (*_REFUSALS, MeshError):
            continue
    return None


def subsampled_phases(composition: Composition) -> tuple[Phase, ...]:
    """Returns the phases, with all full-batch steps as one Gaussian phase."""
    if composition.gaussian_mu == 0:
        return composition.phases
    return (*composition.phases, Phase(1.0, 1 / composition.gaussian_mu, 1))


def affordable_error(
    composition: Composition, delta: float, *, eps_error: float, max_nodes: int
) -> float:
    """Returns the half width that `certify` will use, in hundredths of a second.

    Args:
        composition: Steps composed, with at least one subsampled phase.
        delta: In (0, 1).
        eps_error: Wanted half width of the bounds, > 0.
        max_nodes: Most nodes of the meshes of all phases.

    Returns:
        Half width >= eps_error; eps_error itself where the package cannot answer.
    """
    phases = subsampled_phases(composition)
    if min(p.noise_multiplier for p in phases) < _MIN_NOISE_MULTIPLIER:
        return eps_error
    try:
        least = _error_per_node(phases, _DELTA_SHARES[0] * delta, eps_error) / max_nodes
    except _REFUSALS:
        return eps_error
    return max(eps_error, least)


def _losses(phases: Sequence[Phase]) -> list[Any]:
    """Returns the package's description of the phases."""
    return [
        PoissonSubsampledGaussianMechanism(p.sample_rate, p.noise_multiplier)
        for p in phases
    ]


def _error_per_node(
    phases: Sequence[Phase], delta_error: float, eps_error: float
) -> float:
    """Returns the product of half width and all nodes, from the package's formulas."""
    counts = [p.num_steps for p in phases]
    with _quiet():
        domain = compute_safe_domain_size(
            _losses(phases), counts, eps_error, delta_error
        )
    density = math.sqrt(sum(counts) / 2 * math.log(12 / delta_error))
    return 2 * float(domain) * density * len(phases)


def _discretise(
    phases: Sequence[Phase],
    delta: float,
    delta_error: float,
    *,
    eps_error: float,
    max_nodes: int,
) -> Certificate:
    """Builds the package's accountant on meshes of at most `max_nodes` in all."""
    least = _error_per_node(phases, delta_error, eps_error) / max_nodes
    eps_error = max(eps_error, least)
    with _quiet():
        package = PRVAccountant(
            prvs=_losses(phases),
            max_self_compositions=[p.num_steps for p in phases],
            eps_error=eps_error,
            delta_error=delta_error,
        )
    errors = tuple(
        mean_loss(phase) - float(np.dot(loss.pmf, loss.domain.ts()))
        for phase, loss in zip(phases, package.composer.prvs, strict=True)
    )
    return Certificate(package, delta, eps_error, errors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the package's own numerical warnings, and no others."""
    with warnings.catch_warnings():
        # Its quadrature of the mean is checked against ours, and logarithms of 0
        # are masked by it afterwards.
        warnings.simplefilter("ignore", IntegrationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
