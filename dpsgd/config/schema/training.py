"""Settings of the steps: what is done with a gradient, how often and for how long."""

from dataclasses import dataclass
from typing import Literal

from dpsgd.config.rules import (
    AboveOne,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
)

__all__ = ["EmaConfig", "EvalConfig", "OptimizerConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """What is done with the noisy gradient."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Update rule; the paper's is plain SGD."""

    learning_rate: Positive
    """Step size, > 0, at the top of the schedule."""

    momentum: Fraction = 0.0
    """SGD momentum, in [0, 1)."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW decay rates of the two moments, in [0, 1)."""

    weight_decay: NonNegative = 0.0
    """Decay, >= 0: added to the gradient by SGD, decoupled in AdamW."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or falling to 0 along half a cosine or a line."""

    decay_steps: PositiveInt | None = None
    """Last steps of the run, over which a cosine or line falls; the learning rate is
    constant before them. Null takes all steps after the warm-up."""

    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """The exponential moving average of the parameters."""

    decay: Fraction | None = 0.9999
    """Decay in [0, 1), after the warm-up; null keeps no average."""

    warmup: AboveOne = 10.0
    """Update t has a decay of at most (1 + t)/(warmup + t), > 1: with decay near 1, the
    average is over about the last t/warmup updates. 10 is the paper's; 2 weighs all
    updates equally."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, and from which randomness."""

    num_steps: PositiveInt
    """Steps T: each is one draw, one noise, one update and one composition."""

    label_smoothing: Fraction = 0.0
    """Share of each label, in [0, 1), that is spread evenly over all classes."""

    seed: int | None = None
    """Null draws every stream from the operating system. A seed makes the run
    repeatable, and so unfit to be released as private."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """When the test accuracy is measured."""

    every: PositiveInt = 100
    """Steps between evaluations; the last step is always evaluated."""
