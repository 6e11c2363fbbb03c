"""A step that was begun ahead has the microbatches that it would have had."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd.data import LoadAhead


class Recorded:
    """Yields the parts of a draw, two rows each, and keeps which were made."""

    def __init__(self) -> None:
        self.made: list[tuple[int, list[int]]] = []

    def __call__(self, draw: Any, step: int) -> Iterator[tuple[Tensor, ...]]:
        for part in np.split(draw, range(2, len(draw), 2)):
            self.made.append((step, part.tolist()))
            yield (torch.from_numpy(part) + 100 * step,)


def rows(batches: Any) -> list[int]:
    return [row for (part,) in batches for row in part.tolist()]


def test_begun_steps_are_made_once_and_the_rest_when_asked_for() -> None:
    recorded = Recorded()
    ahead = LoadAhead(recorded)
    ahead.begin(np.arange(5), 1)
    assert recorded.made == [(1, [0, 1])]

    assert rows(ahead(np.arange(5), 1)) == [100, 101, 102, 103, 104]
    assert recorded.made == [(1, [0, 1]), (1, [2, 3]), (1, [4])]
    assert rows(ahead(np.arange(2), 2)) == [200, 201]  # which nobody began


@pytest.mark.parametrize(("begun", "step"), [([0, 1, 2], 2), ([0, 1, 3], 1), ([], 1)])
def test_what_was_begun_for_another_step_or_draw_is_dropped(
    begun: list[int], step: int
) -> None:
    ahead = LoadAhead(Recorded())
    ahead.begin(np.array(begun, np.int64), step)

    assert rows(ahead(np.arange(3), 1)) == [100, 101, 102]
    assert rows(ahead(np.array(begun, np.int64), step)) == [
        row + 100 * step for row in begun
    ]


def test_a_loader_may_return_a_list() -> None:
    ahead = LoadAhead(lambda draw, step: list(Recorded()(draw, step)))
    ahead.begin(np.arange(3), 0)
    assert rows(ahead(np.arange(3), 0)) == [0, 1, 2]


def test_an_empty_draw_is_begun_too() -> None:
    ahead = LoadAhead(lambda draw, step: iter(()))
    ahead.begin(np.arange(0), 0)
    assert rows(ahead(np.arange(0), 0)) == []
