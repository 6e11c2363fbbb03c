"""Types of settings: numbers with the range they must lie in, and names."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

__all__ = [
    "AboveOne",
    "AugmentationName",
    "Fraction",
    "NoiseName",
    "NonNegative",
    "NonNegativeInt",
    "Norm",
    "Positive",
    "PositiveInt",
    "PrivacyUnit",
    "Range",
    "UnitInterval",
]


@dataclass(frozen=True, slots=True)
class Range:
    """A test on a number, and the words for it: `must be {rule}`."""

    rule: str
    holds: Callable[[float], bool]


_POSITIVE = Range("above 0 and finite", lambda value: 0 < value < math.inf)
_ABOVE_ONE = Range("above 1 and finite", lambda value: 1 < value < math.inf)
_NON_NEGATIVE = Range("at least 0 and finite", lambda value: 0 <= value < math.inf)
_FRACTION = Range("in [0, 1)", lambda value: 0 <= value < 1)
_UNIT_INTERVAL = Range("in [0, 1]", lambda value: 0 <= value <= 1)
_NORM = Range(
    "above 0, finite and at least 1e-12, where float32 norms end",
    lambda value: 1e-12 <= value < math.inf,
)

Positive = Annotated[float, _POSITIVE]
AboveOne = Annotated[float, _ABOVE_ONE]
NonNegative = Annotated[float, _NON_NEGATIVE]
Fraction = Annotated[float, _FRACTION]
UnitInterval = Annotated[float, _UNIT_INTERVAL]
Norm = Annotated[float, _NORM]
PositiveInt = Annotated[int, _POSITIVE]
NonNegativeInt = Annotated[int, _NON_NEGATIVE]

AugmentationName = Literal[
    "none", "flip", "crop", "crop_flip", "scaled_crop_flip", "resized_crop_flip"
]
NoiseName = Literal["standard", "secure"]
PrivacyUnit = Literal["example", "user"]
