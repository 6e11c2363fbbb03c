"""What a run has spent, and what it may still spend."""

from functools import cached_property
from typing import Final, final

import numpy as np

from dpsgd.errors import BudgetExceededError, fault
from dpsgd.privacy.accountant import Accountant
from dpsgd.privacy.calibration import calibrate_num_steps
from dpsgd.privacy.mechanism import (
    DPSGDMechanism,
    check_num_steps,
    check_target_epsilon,
)

__all__ = ["PrivacyLedger"]

_CURVE_POINTS: Final = 24


@final
class PrivacyLedger:
    """The account of one run: how far it may go, and what each step has cost.

    Nothing is computed before it is asked for; every answer is then kept.

    Guarantees:
        Every epsilon it states is a certified upper bound.

    Args:
        mechanism: What each step is, and how many are planned.
        accountant: Certifies.
        max_epsilon: Epsilon that training must never pass, > 0; None sets no limit
            but the planned number of steps.

    Raises:
        ConfigError: `max_epsilon` is out of range.
    """

    def __init__(
        self,
        mechanism: DPSGDMechanism,
        accountant: Accountant,
        *,
        max_epsilon: float | None = None,
    ) -> None:
        if max_epsilon is not None:
            check_target_epsilon(max_epsilon)
        self.mechanism: Final = mechanism
        self.accountant: Final = accountant
        self.max_epsilon: Final = max_epsilon
        self._certified: dict[int, float] = {0: 0.0}

    @cached_property
    def max_steps(self) -> int:
        """Most steps that may be taken in total: planned, and within `max_epsilon`."""
        planned = self.mechanism.num_steps
        limit = self.max_epsilon
        if limit is None or self.epsilon_exactly(planned) <= limit:
            return planned
        fitting = calibrate_num_steps(
            target_epsilon=limit,
            sample_rate=self.mechanism.sample_rate,
            noise_multiplier=self.mechanism.noise_multiplier,
            delta=self.mechanism.delta,
            accountant=self.accountant,
        )
        return min(planned, fitting)

    def require(self, step_count: int) -> None:
        """Refuses a total number of steps that would spend more than was granted.

        Args:
            step_count: Steps taken and about to be taken, in total, >= 0.

        Raises:
            BudgetExceededError: It is above `max_steps`.
        """
        if step_count <= self.max_steps:
            return
        if self.max_steps < self.mechanism.num_steps:
            rule = f"passes max_epsilon={self.max_epsilon} after {self.max_steps} steps"
            remedy = "stop here, or start a new run with a higher privacy.max_epsilon"
        else:
            rule = f"passes the {self.max_steps} steps that are accounted for"
            remedy = "stop here, or start a new run with more train.num_steps"
        raise BudgetExceededError(fault("num_steps", step_count, rule, remedy))

    def epsilon_spent(self, num_steps: int) -> float:
        """Returns a certified epsilon after some steps, cheaply enough for every step.

        It is that of the next of some 25 numbers of steps, or of those that
        `epsilon_exactly` was asked for, so that it rises in stairs.

        Guarantees:
            The first `num_steps` steps are (returned value, delta)-DP.

        Args:
            num_steps: Steps taken in total, in [0, max_steps].

        Returns:
            Epsilon >= 0; inf without noise. The first call takes seconds.

        Raises:
            BudgetExceededError: `num_steps` is above `max_steps`.
        """
        check_num_steps(num_steps)
        self.require(num_steps)
        points = {**self._curve, **self._certified}
        return min(value for count, value in points.items() if count >= num_steps)

    def epsilon_exactly(self, num_steps: int) -> float:
        """Returns the certified epsilon of this very number of steps, in seconds.

        Guarantees:
            The first `num_steps` steps are (returned value, delta)-DP.

        Args:
            num_steps: Steps taken in total, >= 0; may be above `max_steps`.

        Returns:
            Epsilon >= 0; inf without noise.
        """
        if num_steps not in self._certified:
            phase = self.mechanism.phase(num_steps)
            bound = self.accountant.epsilon([phase], self.mechanism.delta)
            self._certified[num_steps] = bound.upper
        return self._certified[num_steps]

    @cached_property
    def _curve(self) -> dict[int, float]:
        """Certified epsilons on a grid that is denser at the start, up to the end."""
        grid = np.linspace(0.0, 1.0, _CURVE_POINTS + 1) ** 2 * self.max_steps
        steps = sorted({int(count) for count in np.ceil(grid)})
        bounds = self.accountant.epsilon_curve(
            sample_rate=self.mechanism.sample_rate,
            noise_multiplier=self.mechanism.noise_multiplier,
            steps=steps,
            delta=self.mechanism.delta,
        )
        curve = {count: bound.upper for count, bound in zip(steps, bounds, strict=True)}
        # The curve is coarse; the end is what was promised, and no more is shown.
        curve[self.max_steps] = self.epsilon_exactly(self.max_steps)
        return curve
