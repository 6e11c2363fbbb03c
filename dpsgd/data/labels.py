"""Which labels a data set may have: those of its classes."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dpsgd.errors import DataError, fault

__all__ = ["check_labels"]


def check_labels(
    labels: NDArray[np.int64],
    num_classes: int,
    *,
    field: str,
    place: Callable[[int], str],
    remedy: str,
) -> None:
    """Refuses labels below 0, or beyond the classes if they are declared.

    Args:
        labels: (N,).
        num_classes: Declared classes; 0 if none are.
        field: What names the data set, for the message.
        place: Says where a row is, for the message.
        remedy: What to do about a wrong label.

    Raises:
        DataError: The first label that is refused, with its row.
    """
    limit = num_classes or np.iinfo(np.int64).max
    outside = (labels < 0) | (labels >= limit)
    if outside.any():
        row = int(outside.argmax())
        bound = f"in [0, {num_classes})" if num_classes else "at least 0"
        rule = f"has label {labels[row]}, which must be {bound}"
        raise DataError(fault(field, place(row), rule, remedy))
