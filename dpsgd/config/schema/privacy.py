"""Settings of the guarantee, and of the mechanism that provides it."""

from dataclasses import dataclass

from dpsgd.config.rules import (
    NoiseName,
    NonNegative,
    Norm,
    Positive,
    PositiveInt,
    PrivacyUnit,
)

__all__ = ["PrivacyConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """The guarantee, and the mechanism that provides it."""

    enabled: bool = True
    """False trains WITHOUT any privacy, on public data: shuffled batches of
    `expected_batch_size` examples, no clipping, no noise, no guarantee. Nothing else
    of this section may be set then."""

    unit: PrivacyUnit = "example"
    """Whose presence is hidden: one example, with all its views, or one user, with all
    its examples. Users come from `data.user_column`."""

    max_examples_per_user: PositiveInt | None = None
    """Most examples of one user in a step, >= 1, public; needed where the unit is the
    user. A user with more takes part with a new random subset every step. Passes cost
    as if every user had this many."""

    target_epsilon: Positive | None = None
    """Epsilon to spend at most, > 0; the noise multiplier is calibrated to it.
    Exactly one of this and `noise_multiplier` is given."""

    noise_multiplier: NonNegative | None = None
    """Noise standard deviation over l2_sensitivity, >= 0; 0 has no guarantee."""

    max_epsilon: Positive | None = None
    """Hard limit, > 0: training stops before the step that would pass it."""

    delta: float | None = None
    """Delta of (epsilon, delta)-DP, in (0, 1/num_examples), or (0, 1/num_users);
    required with privacy."""

    expected_batch_size: Positive
    """Public expected number of units, examples or users, a step: the divisor of every
    update, and the sample rate once divided by `num_examples` or `num_users`."""

    clipping_norm: Norm = 1.0
    """Bound C on the L2 norm of one unit's gradient, >= 1e-12, in gradient units."""

    rescale_to_unit_norm: bool = True
    """Divide clipped gradients by C, so that the learning rate does not depend on C."""

    noise: NoiseName = "standard"
    """`standard` is float32 noise from a keyed statistical generator: fast, repeatable
    on resume. `secure` is drawn from the operating system, rounded exactly to a grid,
    and withstands floating-point attacks; it takes tens of nanoseconds a parameter
    and step, and no seed."""

    accountant: str = "prv"
    """Registered accountant that certifies epsilon; docs/accounting.md tells them
    apart. The default, though the slowest, rests on a published package."""
