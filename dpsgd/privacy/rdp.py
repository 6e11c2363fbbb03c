"""The accountant `rdp`: Renyi differential privacy, as most published runs used."""

import math
from collections.abc import Sequence
from typing import ClassVar, final

from dpsgd.privacy.accountant import Accountant
from dpsgd.privacy.bounds import DIRECTIONS, Composition, renyi_epsilon
from dpsgd.privacy.mechanism import EpsilonBound, Phase, check_delta

__all__ = ["RDPAccountant"]


@final
class RDPAccountant(Accountant):
    """Certifies with Renyi divergences, at 5 to 10 % above epsilon, in milliseconds.

    Orders are real numbers and the best is searched for, so that it is never looser
    than an account on a table of orders.

    Source: Mironov, Talwar and Zhang 2019, section 3 (arXiv:1908.10530); conversion:
        Canonne, Kamath and Steinke 2020 (arXiv:2004.00010).
    """

    name: ClassVar[str] = "rdp"
    description: ClassVar[str] = "Renyi divergences (Mironov, Talwar and Zhang 2019)"

    def epsilon(self, phases: Sequence[Phase], delta: float) -> EpsilonBound:
        """Returns an upper bound, with nothing known below it.

        Guarantees:
            The steps are (upper, delta)-DP.

        Args:
            phases: Steps composed; phases may differ in all they have.
            delta: In (0, 1).

        Returns:
            lower = 0 and estimate = upper; zeros without steps, inf without noise.

        Raises:
            ConfigError: `delta` is out of range.
        """
        check_delta(delta)
        composition = Composition.of(phases)
        if math.isinf(composition.gaussian_mu):
            return EpsilonBound(math.inf, math.inf, math.inf)
        if composition.unamplified_mu == 0:
            return EpsilonBound(0.0, 0.0, 0.0)
        upper = max(renyi_epsilon(composition, delta, way)[0] for way in DIRECTIONS)
        return EpsilonBound(0.0, upper, upper)
