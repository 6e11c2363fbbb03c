"""Canaries are rows like any other, with the gradients that they are said to have."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsgd.clipping import clipped_grad
from dpsgd.data import (
    GradientCanaries,
    ImageDataset,
    draw_coins,
    extended,
    mislabelled,
)
from dpsgd.errors import ConfigError
from dpsgd.trees import Params

BOUND = 0.5


def params() -> Params:
    return {"weight": torch.ones(4, 5), "bias": torch.ones(3), "gain": torch.ones(())}


def canaries(num_canaries: int = 6) -> GradientCanaries:
    return GradientCanaries.draw(
        np.random.default_rng(0),
        params(),
        num_canaries=num_canaries,
        first_label=10,
        clipping_norm=BOUND,
    )


def images(num_images: int, num_classes: int = 10) -> ImageDataset:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (num_images, 1, 2, 2), np.uint8)
    labels = rng.integers(0, num_classes, num_images)
    names = tuple(map(str, range(num_classes)))
    return ImageDataset(
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels),
        class_names=names,
    )


def image_loss(params: Params, views: Tensor, label: Tensor) -> Tensor:
    """Depends on all parameters, on the image and on a label below 10."""
    labelled = label.float() * params["bias"].sum()
    return views.mean() * params["weight"].sum() * params["gain"] + labelled


def clipped(batch_labels: list[int], planted: GradientCanaries) -> Params:
    views = torch.linspace(0, 1, 4 * len(batch_labels)).view(-1, 1, 1, 2, 2)
    engine = clipped_grad(planted.loss_fn(image_loss), clipping_norm=BOUND)
    return engine(params(), views, torch.tensor(batch_labels)).clipped_sum


def test_each_canary_has_a_direction_of_its_own() -> None:
    planted = canaries()

    assert planted.coordinates.shape == (6, 4)  # 24 parameters
    assert sorted(planted.coordinates.flatten().tolist()) == [*range(24)]
    for number in range(6):
        grads = clipped([10 + number], planted)
        along = planted.along(grads)
        expected = torch.zeros(6, dtype=torch.float64)
        expected[number] = BOUND
        torch.testing.assert_close(along, expected)
        norm = torch.cat([leaf.flatten() for leaf in grads.values()]).norm()
        assert float(norm) == pytest.approx(BOUND)


def test_what_else_the_loss_is_given_reaches_it_beside_canaries() -> None:
    def loss(params: Params, views: Tensor, label: Tensor, draws: Tensor) -> Tensor:
        return image_loss(params, views, label) * draws.sum()

    planted, views = canaries().loss_fn(loss), torch.ones(1, 1, 2, 2)
    found = planted(params(), views, torch.tensor(3), torch.tensor([2.0, 5.0]))

    assert float(found) == 7 * float(image_loss(params(), views, torch.tensor(3)))


def test_other_examples_keep_their_gradients_beside_canaries() -> None:
    planted = canaries()
    mixed = clipped([3, 12, 7], planted)
    plain = clipped_grad(image_loss, clipping_norm=BOUND)
    views = torch.linspace(0, 1, 12).view(3, 1, 1, 2, 2)
    others = plain(params(), views[[0, 2]], torch.tensor([3, 7])).clipped_sum
    alone = clipped([12], planted)

    for name, leaf in mixed.items():
        torch.testing.assert_close(leaf, others[name] + alone[name])


def test_canaries_that_do_not_divide_the_parameters_leave_some_out() -> None:
    assert canaries(5).coordinates.shape == (5, 4)
    assert len(canaries(0)) == 0
    assert canaries(0).along(params()).shape == (0,)


def test_more_canaries_than_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gradient-canaries=25: .* there are 24;"):
        canaries(25)


def test_records_are_black_images_with_labels_of_their_own() -> None:
    records = canaries().records((1, 2, 2))

    assert records.labels.tolist() == [10, 11, 12, 13, 14, 15]
    assert not records.images.any()


def test_coins_are_fair() -> None:
    coins = draw_coins(np.random.default_rng(0), 10_000)

    # Four standard deviations of the mean of 10,000 coins.
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / 100
    assert draw_coins(np.random.default_rng(0), 0).shape == (0,)


def test_canaries_that_are_in_stand_behind_all_other_rows() -> None:
    held, records = images(5), canaries().records((1, 2, 2))
    is_in = np.array([False, True, True, False, False, True])
    rows = extended(held, records, is_in)

    assert torch.equal(rows.images[:5], held.images)
    assert torch.equal(rows.labels[:5], held.labels)
    assert rows.labels[5:].tolist() == [11, 12, 15]


def test_every_mislabelled_image_has_a_wrong_label_and_each_label_occurs() -> None:
    held = images(400, num_classes=4)
    wrong = mislabelled(np.random.default_rng(0), held, 400, 4)
    shift = (wrong.labels - held.labels[order_of(wrong, held)]) % 4

    assert set(shift.tolist()) == {1, 2, 3}
    # 133 of each are expected, with a standard deviation of 9.4.
    assert min(torch.bincount(shift)[1:].tolist()) > 133 - 4 * 9.4


def order_of(wrong: ImageDataset, held: ImageDataset) -> Tensor:
    """Row in `held` of every image of `wrong`: all pixels differ somewhere."""
    same = (wrong.images[:, None] == held.images[None]).flatten(2).all(2)
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1)


def test_no_image_is_mislabelled_twice_or_invented() -> None:
    held = images(300)
    wrong = mislabelled(np.random.default_rng(0), held, 200, 10)

    assert len(order_of(wrong, held).unique()) == 200
    with pytest.raises(ConfigError, match=r"--image-canaries=301: .* which has 300;"):
        mislabelled(np.random.default_rng(0), held, 301, 10)
