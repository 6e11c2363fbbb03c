"""Turns a YAML value into the declared Python type, or says what is wrong with it.

The loader leaves numbers as text, because YAML 1.1 reads `1e-5` as text and `010` as
8; the declared type of the field decides here, for text and for numbers alike.
"""

import math
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dpsgd.config.rules import Range

__all__ = ["Mismatch", "coerce"]

_DECIMAL = re.compile("[-+]?(0|[1-9][0-9]*)")
_OCTAL = re.compile("[-+]?0[0-9]")


class Mismatch(Exception):
    """A value that does not have the declared type; its text says what it must be."""


def coerce(value: object, declared: Any) -> Any:
    """Returns `value` as the declared type.

    Args:
        value: What was read: str, int, float, bool, None or list.
        declared: A field's annotation: a scalar type, `Literal`, `Annotated` with a
            `Range`, a union, or a tuple of these.

    Raises:
        Mismatch: `value` is not, and does not spell, a value of that type.

    >>> coerce("1e-5", float)
    1e-05
    >>> coerce([1, 2], tuple[float, ...])
    (1.0, 2.0)
    """
    origin = get_origin(declared)
    if origin is Annotated:
        return _in_range(value, *get_args(declared))
    if origin in (Union, types.UnionType):
        return _one_of_types(value, get_args(declared))
    if origin is Literal:
        return _one_of_values(value, get_args(declared))
    if origin is tuple:
        return _tuple(value, get_args(declared))
    return _SCALARS[declared](value)


def _in_range(value: object, declared: Any, allowed: Range) -> Any:
    """Returns the number if it lies in the declared range."""
    number = coerce(value, declared)
    if not allowed.holds(number):
        raise Mismatch(f"{allowed.rule}")
    return number


def _one_of_types(value: object, options: tuple[Any, ...]) -> Any:
    """Returns the value as the first type of a union that takes it."""
    rules = []
    for option in options:
        try:
            return coerce(value, option)
        except Mismatch as mismatch:
            rules.append(str(mismatch))
    raise Mismatch(" or ".join(rules))


def _one_of_values(value: object, options: tuple[Any, ...]) -> Any:
    """Returns the value if it is one of a `Literal`."""
    for option in options:
        if type(value) is type(option) and value == option:
            return value
    raise Mismatch(" or ".join(f"`{option}`" for option in options))


def _tuple(value: object, items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a list as a tuple of coerced items; a lone scalar as one item."""
    values = value if isinstance(value, list | tuple) else [value]
    if items[-1] is Ellipsis:
        if not values or values == [None]:
            raise Mismatch("a list of at least one value")
        return tuple(coerce(one, items[0]) for one in values)
    if len(values) != len(items):
        raise Mismatch(f"a list of {len(items)} values")
    return tuple(coerce(one, item) for one, item in zip(values, items, strict=True))


def _float(value: object) -> float:
    """Returns a number that may be spelt as text, but is never a truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Mismatch("a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise Mismatch("a number") from None
    if math.isnan(number):
        raise Mismatch("a number")
    return number


def _int(value: object) -> int:
    """Returns a whole number; `1e3` counts as one, `010` does not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return int(value)
    try:
        number = _float(value)
    except Mismatch:
        raise Mismatch("a whole number") from None
    if not number.is_integer() or (isinstance(value, str) and _OCTAL.match(value)):
        raise Mismatch("a whole number")
    return int(number)


def _bool(value: object) -> bool:
    """Returns a truth value, and nothing that merely looks like one."""
    if not isinstance(value, bool):
        raise Mismatch("true or false")
    return value


def _str(value: object) -> str:
    """Returns text that is not empty."""
    if not isinstance(value, str) or not value:
        raise Mismatch("text")
    return value


def _none(value: object) -> None:
    """Accepts nothing but null."""
    if value is not None:
        raise Mismatch("null")


_SCALARS = {
    float: _float,
    int: _int,
    bool: _bool,
    str: _str,
    types.NoneType: _none,
}
