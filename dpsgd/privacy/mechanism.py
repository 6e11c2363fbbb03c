"""What is released, in numbers: one description that every room shares.

`DPSGDMechanism` is built once and handed to sampler, engine, noise, accountant,
checkpoint and report, so that what is accounted for is what is done. `Phase` is the
part of it that an accountant needs, and `EpsilonBound` is an accountant's answer.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final, Self

from dpsgd.errors import ConfigError, fault

__all__ = [
    "ADJACENCY",
    "DPSGDMechanism",
    "EpsilonBound",
    "Phase",
    "check_delta",
    "check_noise_multiplier",
    "check_num_steps",
    "check_sample_rate",
    "check_target_epsilon",
    "rounded_up",
]

ADJACENCY: Final = "add-or-remove-one"
UNITS: Final = ("example", "user")

_MAX_STEPS: Final = 10**12


def check_sample_rate(sample_rate: float) -> None:
    """Raises ConfigError unless the sample rate is in (0, 1]."""
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            fault(
                "sample_rate",
                sample_rate,
                "must be in (0, 1]",
                "give expected_batch_size / num_examples",
            )
        )


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raises ConfigError unless the noise multiplier is finite and >= 0."""
    if not 0 <= noise_multiplier < math.inf:
        raise ConfigError(
            fault(
                "noise_multiplier",
                noise_multiplier,
                "must be at least 0 and finite",
                "give noise_std / l2_sensitivity",
            )
        )


def check_num_steps(num_steps: int) -> None:
    """Raises ConfigError unless the number of steps is a whole number in [0, 1e12]."""
    if isinstance(num_steps, int) and 0 <= num_steps <= _MAX_STEPS:
        return
    raise ConfigError(
        fault(
            "num_steps",
            num_steps,
            f"must be a whole number in [0, {_MAX_STEPS:g}]",
            "count updates, not epochs",
        )
    )


def check_delta(delta: float) -> None:
    """Raises ConfigError unless delta is in (0, 1)."""
    if not 0 < delta < 1:
        raise ConfigError(
            fault(
                "delta",
                delta,
                "must be in (0, 1)",
                "take a value below 1/num_examples",
            )
        )


def check_target_epsilon(target_epsilon: float) -> None:
    """Raises ConfigError unless the wanted epsilon is finite and > 0."""
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(
            fault(
                "target_epsilon",
                target_epsilon,
                "must be above 0 and finite",
                "ask for an epsilon that noise can reach",
            )
        )


@dataclass(frozen=True)
class Phase:
    """A run of equal steps, as an accountant sees it.

    Args:
        sample_rate: Poisson inclusion probability q, in [0, 1]; 0 releases nothing.
        noise_multiplier: Noise standard deviation over l2_sensitivity, >= 0, finite.
        num_steps: Steps composed, >= 0.

    Raises:
        ConfigError: A value is out of range or not a number.
    """

    sample_rate: float
    noise_multiplier: float
    num_steps: int

    def __post_init__(self) -> None:
        if self.sample_rate != 0:
            check_sample_rate(self.sample_rate)
        check_noise_multiplier(self.noise_multiplier)
        check_num_steps(self.num_steps)


@dataclass(frozen=True)
class EpsilonBound:
    """What is known of the smallest epsilon at a given delta.

    Args:
        lower: The true epsilon is at least this, >= 0.
        estimate: Best guess, in [lower, upper].
        upper: The certified epsilon: the only one to promise; inf if there is none.
    """

    lower: float
    estimate: float
    upper: float


def rounded_up(epsilon: float, digits: int = 4) -> str:
    """Returns an upper bound in digits that are an upper bound too.

    Args:
        epsilon: Bound, >= 0; may be inf.
        digits: Digits after the point.

    >>> rounded_up(7.00001), rounded_up(8.0)
    ('7.0001', '8.0000')
    """
    scale = 10**digits
    exact = math.ceil(epsilon * scale) / scale if math.isfinite(epsilon) else epsilon
    return f"{exact:.{digits}f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DPSGDMechanism:
    """The Poisson-subsampled Gaussian mechanism of one training run.

    Guarantees:
        Frozen and validated: whoever holds one holds a possible mechanism.

    Args:
        sample_rate: Poisson inclusion probability q, in (0, 1].
        num_steps: Planned steps T, >= 0; one step is one composition.
        noise_multiplier: noise_std / l2_sensitivity, >= 0; 0 has no guarantee.
        clipping_norm: Bound C on the L2 norm of one unit's gradient, > 0.
        expected_batch_size: Public divisor B of the noisy sum, > 0, in units.
        delta: Delta of the guarantee, in (0, 1).
        rescale_to_unit_norm: Whether clipped gradients are divided by C.
        unit: Whose presence is hidden: `example`, or `user` with all its examples. It
            is what is sampled, clipped and counted; the arithmetic is the same.

    Raises:
        ConfigError: A value is out of range or not a number.

    Source: Abadi et al. 2016, Algorithm 1 (arXiv:1607.00133).
    """

    sample_rate: float
    num_steps: int
    noise_multiplier: float
    clipping_norm: float
    expected_batch_size: float
    delta: float
    rescale_to_unit_norm: bool = False
    unit: str = "example"

    def __post_init__(self) -> None:
        check_sample_rate(self.sample_rate)
        check_num_steps(self.num_steps)
        check_noise_multiplier(self.noise_multiplier)
        for name, value in (
            ("clipping_norm", self.clipping_norm),
            ("expected_batch_size", self.expected_batch_size),
        ):
            if not 0 < value < math.inf:
                raise ConfigError(
                    fault(name, value, "must be above 0 and finite", "raise it")
                )
        check_delta(self.delta)
        if self.unit not in UNITS:
            rule = f"must be one of {', '.join(UNITS)}"
            raise ConfigError(fault("unit", self.unit, rule, "take one of them"))

    @property
    def adjacency(self) -> str:
        """Which data sets are neighbours: those that differ by one unit's presence.

        The guarantee for replacing one unit is weaker, up to twice the epsilon.
        """
        return ADJACENCY

    @property
    def l2_sensitivity(self) -> float:
        """Most that one unit moves the clipped sum: C, or 1 if it is rescaled."""
        return 1.0 if self.rescale_to_unit_norm else self.clipping_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the clipped sum.

        >>> DPSGDMechanism(
        ...     sample_rate=0.01, num_steps=10, noise_multiplier=1.5, delta=1e-5,
        ...     clipping_norm=2.0, expected_batch_size=100,
        ... ).noise_std
        3.0
        """
        return self.noise_multiplier * self.l2_sensitivity

    def phase(self, num_steps: int | None = None) -> Phase:
        """Returns the mechanism as an accountant sees it.

        Args:
            num_steps: Steps actually taken, >= 0; None means all that are planned.
        """
        steps = self.num_steps if num_steps is None else num_steps
        return Phase(self.sample_rate, self.noise_multiplier, steps)

    def to_dict(self) -> dict[str, float | int | bool | str]:
        """Returns the fields as plain values, for a checkpoint or a report."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, float | int | bool | str]) -> Self:
        """Returns the mechanism that `to_dict` described.

        Args:
            state: Exactly the fields of this class.

        Raises:
            ConfigError: A field is missing, unknown or out of range.
        """
        known = [item.name for item in fields(cls)]
        odd = sorted(set(known).symmetric_difference(state))
        if odd:
            raise ConfigError(
                fault(
                    "mechanism",
                    ", ".join(odd),
                    "missing or unknown fields",
                    "use a checkpoint of this version of dpsgd",
                )
            )
        return cls(**state)  # type: ignore[arg-type]  # the fields check themselves

    def differences(self, other: "DPSGDMechanism") -> list[str]:
        """Returns one line `field: ours != theirs` for each field that differs.

        Args:
            other: Mechanism to compare with, exactly, without tolerance.

        Returns:
            Lines in the order of the fields; empty if the mechanisms are the same.
        """
        return [
            f"{item.name}: {getattr(self, item.name)} != {getattr(other, item.name)}"
            for item in fields(self)
            if getattr(self, item.name) != getattr(other, item.name)
        ]
