"""Users: which examples belong to each, and which of them a step uses.

Where `privacy.unit` is `user`, a draw is of users. All that one user adds to a step is
one averaged gradient, so that the whole of its examples is hidden, not each one alone.
"""

from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["UserExamples"]


@final
class UserExamples:
    """The rows of every user's examples.

    Args:
        users: (N,) int64, the user whom each example belongs to, from 0 without gaps.
    """

    def __init__(self, users: Tensor) -> None:
        self._counts = torch.bincount(users).numpy()
        self._starts = np.cumsum(self._counts) - self._counts
        self._rows = torch.argsort(users, stable=True).numpy()  # user after user

    def __len__(self) -> int:
        return len(self._counts)

    def select(
        self,
        draw: NDArray[np.int64],
        *,
        max_examples: int,
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        r"""Selects the examples that the drawn users take part with in one step.

        A user with at most `max_examples` takes part with all of them; one with more,
        with a uniform subset of that size. It is drawn anew at every step, so that in
        time every example is used, and without looking at anything but the number of
        the user's own examples.

        Guarantees:
            What is selected of a user depends on its own examples and on `rng`, never
            on another user. Padding repeats an example of the same user, so that
            another user's pixels cannot reach its gradient, not even as a NaN.
            A user appended to the draw leaves the selection of those before it as it
            was.

        Args:
            draw: (R,) int64 users, each once.
            max_examples: Most examples S of a user, >= 1, a public constant.
            rng: The stream `selection` of this step.

        Returns:
            (R, S) int64 rows of the data set, and (R, S) bool, False for padding; at
            least one slot of every user is True.

        Source: Floyd's algorithm, Bentley and Floyd 1987, "A sample of brilliance",
        Communications of the ACM 30(9).

        >>> mine = UserExamples(torch.tensor([0, 1, 0, 0]))
        >>> rows, present = mine.select(
        ...     np.array([0, 1]), max_examples=3, rng=np.random.default_rng(0)
        ... )
        >>> print(rows, present, sep="\n")
        [[0 2 3]
         [1 1 1]]
        [[ True  True  True]
         [ True False False]]
        """
        counts = self._counts[draw][:, None]  # (R, 1)
        slots = np.arange(max_examples)
        # As many numbers for each user, whether used or not: no user shifts another's.
        uniforms = rng.random((len(draw), max_examples))
        chosen = np.minimum(slots, counts - 1)  # all examples of a user with few
        has_more = counts[:, 0] > max_examples
        chosen[has_more] = _subsets(uniforms[has_more], counts[has_more, 0])
        return self._rows[self._starts[draw][:, None] + chosen], slots < counts


def _subsets(
    uniforms: NDArray[np.float64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns a uniform subset of [0, count), as large as a row of uniforms, a row."""
    size = uniforms.shape[1]
    chosen = np.empty(uniforms.shape, np.int64)
    for slot in range(size):
        newest = counts - size + slot
        pick = (uniforms[:, slot] * (newest + 1)).astype(np.int64)
        is_taken = (chosen[:, :slot] == pick[:, None]).any(axis=1)
        chosen[:, slot] = np.where(is_taken, newest, pick)
    return chosen
