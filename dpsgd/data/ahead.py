"""Loads a step while the device still works on the one before."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.data.batches import LoadViews

__all__ = ["LoadAhead"]


class _Begun(NamedTuple):
    """A step that is being loaded, and for which draw."""

    draw: NDArray[np.int64]
    step: int
    batches: Iterator[tuple[Tensor, ...]]


@final
class LoadAhead:
    """Loads as another loader does, and may begin before it is asked to.

    What is random in a step follows from the step alone, so that it does not matter
    when it is drawn. On a GPU the loop waits for the device once a step; a step that
    was begun before then has its first microbatch there at once.

    Args:
        load_views: What loads.
    """

    def __init__(self, load_views: LoadViews) -> None:
        self._load_views = load_views
        self._begun: _Begun | None = None

    def begin(self, draw: NDArray[np.int64], step: int) -> None:
        """Makes the first microbatch of a step, and draws what is random in it."""
        loading = iter(self._load_views(draw, step))
        first = list(islice(loading, 1))
        self._begun = _Begun(draw, step, chain(first, loading))

    def __call__(
        self, draw: NDArray[np.int64], step: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields what the other loader yields; what was begun for else is dropped."""
        begun, self._begun = self._begun, None
        if begun is None or begun.step != step or not np.array_equal(begun.draw, draw):
            return self._load_views(draw, step)
        return begun.batches
