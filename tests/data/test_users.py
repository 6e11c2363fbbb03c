"""Which of a user's examples a step uses, and the views that are made of them."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from dpsgd.config import DataConfig
from dpsgd.data import ImageDataset, UserExamples, UserViewLoader, ViewLoader
from dpsgd.errors import DataError
from dpsgd.rng import RandomStreams

# Users 0 to 3 have 1, 5, 2 and 7 examples, their rows mixed.
OWNERS = torch.tensor([1, 0, 3, 3, 1, 2, 3, 1, 3, 1, 3, 2, 1, 3, 3])
COUNTS = [1, 5, 2, 7]
STREAMS = RandomStreams.from_seed(5)


def select(draw: list[int], step: int = 0, most: int = 3) -> tuple[np.ndarray, ...]:
    rng = STREAMS.generator("selection", step)
    users = UserExamples(OWNERS)
    return users.select(np.array(draw, np.int64), max_examples=most, rng=rng)


def test_every_slot_holds_an_example_of_its_own_user() -> None:
    for step in range(50):
        rows, present = select([0, 1, 2, 3], step)
        assert rows.shape == present.shape == (4, 3)
        owners = OWNERS[rows].numpy()
        np.testing.assert_array_equal(owners, np.arange(4)[:, None] * np.ones((1, 3)))
        for user, count in enumerate(COUNTS):
            chosen = rows[user][present[user]]
            assert len(set(chosen)) == len(chosen) == min(3, count)


def test_users_with_few_examples_take_part_with_all_of_them() -> None:
    rows, present = select([3, 2, 1, 0], most=7)

    for position, user in enumerate((3, 2, 1, 0)):
        mine = OWNERS.eq(user).nonzero().flatten().tolist()
        assert sorted(rows[position][present[position]]) == mine


def test_a_user_with_more_takes_part_with_a_uniform_subset() -> None:
    subsets: Counter[tuple[int, ...]] = Counter()
    first: Counter[int] = Counter()
    for step in range(4_200):
        rows, _ = select([3], step)
        subsets[tuple(sorted(rows[0]))] += 1
        first[min(rows[0])] += 1

    assert len(subsets) == math.comb(7, 3)
    assert stats.chisquare(list(subsets.values())).pvalue > 1e-4
    # The test has power: the smallest row of a subset is not uniform, and is seen so.
    assert stats.chisquare(list(first.values())).pvalue < 1e-12


def test_another_user_leaves_a_selection_as_it_was() -> None:
    for step in range(50):
        few, more = select([1, 2], step), select([1, 2, 3], step)
        np.testing.assert_array_equal(few[0], more[0][:2])
        np.testing.assert_array_equal(few[1], more[1][:2])
        other = select([0, 2], step)
        np.testing.assert_array_equal(few[0][1], other[0][1])


def test_an_empty_draw_selects_nothing() -> None:
    rows, present = select([])

    assert rows.shape == present.shape == (0, 3)


def dataset(users: torch.Tensor | None = OWNERS) -> ImageDataset:
    images = torch.arange(15 * 3 * 4 * 4).view(15, 3, 4, 4) % 251
    return ImageDataset(
        images=images.to(torch.uint8), labels=torch.arange(15), users=users
    )


CONFIG = DataConfig(
    source="parquet",
    augmentation="crop_flip",
    crop_padding=1,
    augmentation_multiplicity=2,
)


def loader(
    microbatch_size: int, most: int = 3, draws_per_view: int = 0
) -> UserViewLoader:
    return UserViewLoader(
        dataset(),
        config=CONFIG,
        streams=STREAMS,
        max_examples=most,
        microbatch_size=microbatch_size,
        draws_per_view=draws_per_view,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_the_views_of_a_user_are_those_of_its_selected_examples() -> None:
    draw = np.array([0, 1, 3])
    (views, labels, present, mask), *rest = loader(4)(draw, 2)
    rows, chosen = select([0, 1, 3], 2)
    of_examples = ViewLoader(
        dataset(),
        config=CONFIG,
        streams=STREAMS,
        microbatch_size=9,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    ((expected, _, _),) = of_examples(rows.ravel(), 2)

    assert not rest
    assert views.shape == (4, 3, 2, 3, 4, 4)
    assert labels.shape == present.shape == (4, 3)
    assert mask.tolist() == [True, True, True, False]
    torch.testing.assert_close(views[:3].flatten(0, 1), expected, rtol=0, atol=0)
    np.testing.assert_array_equal(labels[:3], rows)  # label i belongs to row i
    np.testing.assert_array_equal(present[:3], chosen)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 7])
def test_the_microbatch_size_changes_no_user(microbatch_size: int) -> None:
    draw = np.array([0, 1, 2, 3])
    (whole,) = loader(4, draws_per_view=5)(draw, 7)
    parts = list(loader(microbatch_size, draws_per_view=5)(draw, 7))
    kept = [
        torch.cat([part[index][part[-1]] for part in parts])
        for index in range(len(whole))
    ]

    assert whole[3].shape == (4, 3, 2, 5)  # uniform numbers of each view
    for mine, expected in zip(kept, whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_an_empty_draw_yields_no_microbatch() -> None:
    assert list(loader(4)(np.array([], np.int64), 0)) == []


@pytest.mark.parametrize(
    "users",
    [OWNERS[:-1], OWNERS + 1, OWNERS - 1, 2 * OWNERS, OWNERS.int(), OWNERS[None]],
    ids=["too_few", "from_one", "negative", "gaps", "type", "shape"],
)
def test_users_that_are_not_numbered_by_example_are_refused(
    users: torch.Tensor,
) -> None:
    with pytest.raises(DataError, match=r"users=<.*>: must be "):
        dataset(users)


def test_users_are_part_of_what_identifies_the_data() -> None:
    swapped = OWNERS.clone()
    swapped[[0, 1]] = OWNERS[[1, 0]]
    prints = {dataset(users).fingerprint() for users in (None, OWNERS, swapped)}

    assert len(prints) == 3
    assert dataset().num_users == 4


def test_a_data_set_without_users_has_no_number_of_them() -> None:
    with pytest.raises(DataError, match=r"data\.user_column=null: the data set does"):
        _ = dataclasses.replace(dataset(), users=None).num_users
