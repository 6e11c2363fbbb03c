"""Values as people read them: one that is missing is `not recorded`, or `none`."""

import math
from typing import Any, Final

from dpsgd.privacy import rounded_up

__all__ = [
    "NONE",
    "NOT_RECORDED",
    "count",
    "duration",
    "epsilon_in_words",
    "interval_in_words",
    "percent",
    "setting_in_words",
    "significant",
    "size",
    "steps_in_words",
]

NOT_RECORDED: Final = "not recorded"
NONE: Final = "none"
"""Of what a run does not have, as one without privacy has no delta."""

_TENTHS_BELOW: Final = 10
_MINUTE: Final = 60
_HOUR: Final = 3600


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share in per cent.

    >>> percent(0.97777), percent(None)
    ('97.8 %', 'not recorded')
    """
    return NOT_RECORDED if share is None else f"{100 * share:.{digits}f} %"


def interval_in_words(interval: tuple[float, float]) -> str:
    """Returns the two ends of an interval of shares.

    >>> interval_in_words((0.9568, 0.9887))
    '95.7 to 98.9 %'
    """
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def count(value: float | None) -> str:
    """Returns a whole number, or one that need not be whole, with separators.

    >>> count(50000), count(4096.0), count(None)
    ('50,000', '4,096', 'not recorded')
    """
    return NOT_RECORDED if value is None else f"{value:,.10g}"


def significant(value: float | None, digits: int = 6) -> str:
    """Returns a number to some digits, like 2.56281 or 1e-05."""
    return NOT_RECORDED if value is None else f"{value:.{digits}g}"


def steps_in_words(step: int, planned: int | None, saved: int | None = None) -> str:
    """Returns how far a run was evaluated, and saved where that is further.

    >>> steps_in_words(200, 2000), steps_in_words(200, 2000, 200)
    ('200 of 2,000', '200 of 2,000')
    >>> steps_in_words(200, 2000, 217), steps_in_words(0, 2000, 17)
    ('217 of 2,000, evaluated at 200', '17 of 2,000, not evaluated yet')
    """
    if saved is None or saved <= step:
        return f"{count(step)} of {count(planned)}"
    evaluated = f"evaluated at {count(step)}" if step else "not evaluated yet"
    return f"{count(saved)} of {count(planned)}, {evaluated}"


def duration(seconds: float | None) -> str:
    """Returns a time in two units at most.

    >>> duration(13.2), duration(224), duration(7500), duration(0.03)
    ('13 s', '3 min 44 s', '2 h 5 min', '0.03 s')
    >>> duration(1.288), duration(9.97)
    ('1.3 s', '10 s')
    """
    if seconds is None:
        return NOT_RECORDED
    if seconds < _TENTHS_BELOW:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def size(num_bytes: float | None) -> str:
    """Returns an amount of memory.

    >>> size(930861056), size(6.2e9)
    ('888 MiB', '5.8 GiB')
    """
    if num_bytes is None:
        return NOT_RECORDED
    gibibytes = num_bytes / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{1024 * gibibytes:.0f} MiB"


def epsilon_in_words(epsilon: float | None) -> str:
    """Returns an upper bound, rounded up.

    >>> epsilon_in_words(7.99995), epsilon_in_words(float("inf"))
    ('8.0000', 'infinite')
    """
    if epsilon is None:
        return NOT_RECORDED
    return rounded_up(epsilon) if math.isfinite(epsilon) else "infinite"


def setting_in_words(value: Any) -> str:
    """Returns a setting as it is written in YAML.

    >>> setting_in_words(None), setting_in_words([0.5, 0.25]), setting_in_words(True)
    ('null', '[0.5, 0.25]', 'true')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting_in_words(one) for one in value) + "]"
    return str(value)
