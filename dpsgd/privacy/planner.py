"""How budget, noise and batch size interact: the noise each plan needs for an epsilon.

What training suffers from is the noise on a coordinate of the averaged gradient, of
standard deviation sigma C / B. At the same epsilon and the same number of examples
processed, a larger batch needs more noise on the sum and less on the average.

Source: De et al. 2022, section 4 (arXiv:2204.13650).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dpsgd.errors import ConfigError, fault
from dpsgd.privacy.accountant import Accountant
from dpsgd.privacy.calibration import calibrate_noise_multiplier
from dpsgd.privacy.mechanism import Phase, check_num_steps

__all__ = ["Budget", "PlannedRun"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One way to spend a budget.

    Args:
        expected_batch_size: B, in examples.
        num_steps: T.
        noise_multiplier: sigma, calibrated to the target.
        epsilon: What it is certified to spend, at most the target.
        noise_per_coordinate: Standard deviation sigma C / B of the noise on each
            coordinate of the averaged gradient, in gradient units.
        examples_processed: B T, in expectation.
        epochs: Examples processed over the size of the training set.
    """

    expected_batch_size: float
    num_steps: int
    noise_multiplier: float
    epsilon: float
    noise_per_coordinate: float
    examples_processed: float
    epochs: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent, and on what.

    Args:
        target_epsilon: Epsilon not to pass, > 0, finite.
        delta: In (0, 1 / num_examples).
        num_examples: Public size N of the training set, >= 1.
        clipping_norm: Bound C on the L2 norm of one example's gradient, > 0.
        accountant: Certifies what runs spend.

    Raises:
        ConfigError: Delta is not below 1 / num_examples.
    """

    target_epsilon: float
    delta: float
    num_examples: int
    clipping_norm: float
    accountant: Accountant

    def __post_init__(self) -> None:
        if self.delta >= 1 / self.num_examples:
            rule = f"must be below 1/num_examples ({1 / self.num_examples:.1e})"
            raise ConfigError(fault("delta", self.delta, rule, "lower delta"))

    def steps_of(
        self, expected_batch_size: float, epochs: Iterable[float]
    ) -> list[int]:
        """Returns the numbers of steps that are nearest to numbers of epochs.

        Args:
            expected_batch_size: In (0, num_examples].
            epochs: Each > 0.

        Returns:
            Different numbers of steps >= 1, rising.
        """
        steps = self.num_examples / expected_batch_size
        return sorted({max(1, round(count * steps)) for count in epochs})

    def plan(self, expected_batch_size: float, num_steps: int) -> PlannedRun:
        """Returns what one batch size and number of steps ask for.

        Args:
            expected_batch_size: In (0, num_examples].
            num_steps: >= 0.

        Raises:
            ConfigError: An argument is out of range.
        """
        check_num_steps(num_steps)
        if not 0 < expected_batch_size <= self.num_examples:
            rule = f"must be above 0 and at most num_examples ({self.num_examples})"
            raise ConfigError(
                fault("expected_batch_size", expected_batch_size, rule, "lower it")
            )
        sample_rate = expected_batch_size / self.num_examples
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon=self.target_epsilon,
            sample_rate=sample_rate,
            num_steps=num_steps,
            delta=self.delta,
            accountant=self.accountant,
        )
        phase = Phase(sample_rate, noise_multiplier, num_steps)
        noise_std = noise_multiplier * self.clipping_norm
        return PlannedRun(
            expected_batch_size=expected_batch_size,
            num_steps=num_steps,
            noise_multiplier=noise_multiplier,
            epsilon=self.accountant.epsilon([phase], self.delta).upper,
            noise_per_coordinate=noise_std / expected_batch_size,
            examples_processed=expected_batch_size * num_steps,
            epochs=sample_rate * num_steps,
        )
