r"""Noise that withstands attacks on low-order bits: `privacy.noise: secure`.

What is released of a sum S is the whole numbers $R = \mathrm{round}(S / \gamma) + X$ on
a grid of spacing $\gamma$, X a Gaussian rounded to whole numbers; all that follows is
computed from R. R is at the same time a real Gaussian added to $\mathrm{round}(S /
\gamma)$, and then rounded: post-processing of the very mechanism that is accounted for.
No account of discrete noise is needed, and no low bit tells the sum from the noise.

The noise is for the sensitivity that the rounded sum has on this machine, not for C,
which it has on paper. Two neighbours' rounded sums differ by at most the sum of

* (1 + a) C: float32 lets a clipped gradient past its bound by a share a;
* twice the error of a float64 sum of the draw;
* $\gamma \sqrt d$: rounding moves each of d coordinates of each sum by up to
  $\gamma / 2$.

Source: Mironov 2012, "On significance of the least significant bits for differential
privacy" (the attack); Casacuberta et al. 2022 (arXiv:2207.10635: sensitivity of sums in
floating point); Haney et al. 2022 (arXiv:2207.13793: sampling by interval refining).
Canonne, Kamath and Steinke 2020 (arXiv:2004.00010) round and add a discrete Gaussian,
whose subsampled composition has no certified account here. Summing several Gaussians
(Holohan and Braghin 2021, arXiv:2107.10138) makes the attack dear, not impossible.
"""

import math
from dataclasses import dataclass
from typing import Final, Self

import torch

from dpsgd.errors import fault
from dpsgd.optim.rounded_gaussian import rounded_gaussian
from dpsgd.privacy import DPSGDMechanism
from dpsgd.trees import Params, num_elements

__all__ = ["SecureNoise"]

_ROUNDING_SHARE: Final = 2.0**-16  # of the sensitivity, that rounding to the grid adds
_FLOAT64_ERROR: Final = 2.0**-53


@dataclass(frozen=True, kw_only=True, slots=True)
class SecureNoise:
    """The grid that sums are rounded to, and the noise that is added on it.

    Attributes:
        spacing: Of the grid, in units of the sum; a power of two, so that no rounding
            happens in changing to grid units and back.
        sensitivity: L2 sensitivity of the rounded sum, in units of the sum.
        std: Standard deviation of the noise before rounding, in grid units: at least
            noise_multiplier times the sensitivity.
    """

    spacing: float
    sensitivity: float
    std: float

    @classmethod
    def for_sums(
        cls, mechanism: DPSGDMechanism, *, num_parameters: int, clipping_slack: float
    ) -> Self:
        """Returns the noise for the float64 sums of a mechanism.

        Guarantees:
            `sensitivity` bounds the difference of two neighbours' rounded sums, if what
            one unit adds to a sum does not depend on the others, and no more than
            4 B + 16384 units are drawn. More are drawn with a probability below
            1e-1000 (Chernoff) while at most twice the declared number are held.

        Args:
            mechanism: Says sensitivity, noise multiplier and expected batch size.
            num_parameters: Coordinates d of the sum, >= 1.
            clipping_slack: By how much float32 lets a clipped gradient pass its bound,
                as a share of it: `dpsgd.clipping.clipping_slack`.

        Source: the error of a sum of n terms: Higham 2002, "Accuracy and Stability of
        Numerical Algorithms", section 4.2.
        """
        most = 4 * mechanism.expected_batch_size + 16384
        length = mechanism.l2_sensitivity * (1 + clipping_slack)
        summation = 2 * 1.01 * most**2 * _FLOAT64_ERROR * length
        across = math.sqrt(num_parameters)
        finest = _ROUNDING_SHARE * mechanism.l2_sensitivity / across
        spacing = 2.0 ** math.floor(math.log2(finest))
        sensitivity = length + summation + spacing * across
        std = math.ceil(mechanism.noise_multiplier * sensitivity / spacing)
        return cls(spacing=spacing, sensitivity=sensitivity, std=std)

    def add_(self, clipped_sum: Params) -> None:
        """Rounds a sum to the grid and adds noise to it, in place.

        Guarantees:
            What is left depends on the sum through its rounding plus noise alone. The
            noise is drawn from the operating system, once, for all coordinates, and
            cannot be repeated.

        Args:
            clipped_sum: Float64 leaves, the sum over all microbatches of one draw.

        Raises:
            ValueError: A leaf is not float64.
        """
        for name, total in clipped_sum.items():
            if total.dtype != torch.float64:
                rule = "secure noise is for sums formed in float64"
                remedy = "give the engine such totals"
                raise ValueError(fault(name, total.dtype, rule, remedy))
        threads = torch.get_num_threads()
        count = num_elements(clipped_sum)
        noise = torch.from_numpy(rounded_gaussian(count, self.std, num_threads=threads))
        start = 0
        for total in clipped_sum.values():
            part = noise[start : start + total.numel()].view(total.shape)
            start += total.numel()
            total.div_(self.spacing).round_()
            # A sum of two whole numbers, rounded once: a function of their sum alone,
            # once 0 has one sign.
            total.add_(part.to(total.device)).add_(0.0).mul_(self.spacing)
