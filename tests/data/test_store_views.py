"""Views from a store: the published transforms, however the work is spread."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from store_views import (
    CPU,
    SIZE,
    STREAMS,
    central_square,
    decoded,
    loader,
    pixels,
    settings,
    two_stores,
    views_of,
)
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data import ViewLoader, draw_views, load_datasets, normalize
from dpsgd.data.store import Store
from dpsgd.data.store.framing import random_part

AUGMENTATIONS = ["none", "flip", "scaled_crop_flip", "resized_crop_flip"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_stores(tmp_path_factory.mktemp("stores"))


def expected_view(
    image: Image.Image, config: DataConfig, views: Any, m: int, k: int
) -> Tensor:
    """One view by torchvision's transforms, with the parameters of the loader."""
    if config.augmentation == "resized_crop_flip":
        left, top, right, bottom = random_part(*image.size, views.crops[m, k].numpy())
        shown = pixels(image.crop((left, top, right, bottom)), SIZE)
    else:
        side = 12 if config.augmentation == "scaled_crop_flip" else SIZE
        top, left = views.offsets[m, k].tolist()
        shown = pixels(central_square(image), side)[
            :, top : top + SIZE, left : left + SIZE
        ]
    shown = shown.flip(2) if views.flips[m, k] else shown
    return normalize(shown, mean=config.mean, std=config.std)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_views_are_those_of_the_published_transforms(
    folder: Path, tmp_path: Path, augmentation: str
) -> None:
    config = settings(folder, augmentation=augmentation)
    draw = [0, 3, 4, 11, 19]
    views, labels = views_of(config, draw)
    parameters = draw_views(
        STREAMS.generator("augmentation", 7),
        len(draw),
        augmentation=augmentation,
        crop_padding=0,
        augmentation_multiplicity=3,
        image_size=SIZE,
    )
    store = Store(folder / "train")

    assert views.shape == (5, 3, 3, SIZE, SIZE)
    assert labels.tolist() == store.labels[draw].tolist()
    for m, row in enumerate(draw):
        image = decoded(store, row, tmp_path)
        for k in range(3):
            expected = expected_view(image, config, parameters, m, k)
            assert torch.equal(views[m, k], expected), (m, k)
    if augmentation != "none":
        assert not torch.equal(views[:, 0], views[:, 1])


@pytest.mark.parametrize("augmentation", ["scaled_crop_flip", "resized_crop_flip"])
def test_views_do_not_depend_on_how_the_work_is_spread(
    folder: Path, augmentation: str
) -> None:
    config = settings(folder, augmentation=augmentation)
    draw = [*range(2, 19)]
    views, labels = views_of(config, draw)

    for how in ({"microbatch": 17}, {"microbatch": 1}):
        assert torch.equal(views_of(config, draw, **how)[0], views)
    for microbatch in (3, 17):  # many batches, and one of several tasks
        spread = views_of(config, draw, workers=2, microbatch=microbatch)
        assert torch.equal(spread[0], views)
        assert torch.equal(spread[1], labels)
    assert torch.equal(views_of(config, draw[:9])[0], views[:9])  # one more example
    assert not torch.equal(views_of(config, draw, step=8)[0], views)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["scaled_crop_flip", "resized_crop_flip"])
def test_views_on_a_gpu_are_those_of_the_cpu(folder: Path, augmentation: str) -> None:
    config = settings(folder, augmentation=augmentation)
    cuda = torch.device("cuda")
    load_views = ViewLoader(
        load_datasets(config).train.placed(cuda, num_workers=2),
        config=config,
        streams=STREAMS,
        microbatch_size=2,
        dtype=torch.float32,
        device=cuda,
    )
    # Work that is still running when later batches are copied.
    parts = [views.square().sqrt_() for views, _, _ in load_views(np.arange(20), 7)]
    expected, _ = views_of(config, [*range(20)], microbatch=2)

    torch.testing.assert_close(torch.cat(parts).cpu(), expected.abs())


def test_the_shares_of_a_draw_are_the_draw(folder: Path) -> None:
    config, draw = settings(folder), np.array([2, 5, 6, 11, 19])
    dataset = load_datasets(config).train.placed(CPU, num_workers=0)

    def views(own: slice) -> Tensor:
        load = ViewLoader(
            dataset,
            config=config,
            streams=STREAMS,
            microbatch_size=1,
            dtype=torch.float32,
            device=CPU,
            share=lambda count: own,
        )
        return torch.cat([views for views, _, _ in load(draw, 7)])

    shares = [views(slice(0, 2)), views(slice(2, 5))]
    assert torch.equal(torch.cat(shares), views(slice(0, 5)))


def test_a_loader_that_is_left_early_harms_no_later_draw(folder: Path) -> None:
    config = settings(folder)
    load_views = loader(config, workers=2, microbatch=2)
    left = load_views(np.arange(20), 0)
    next(left)
    left.close()
    views = torch.cat([views for views, _, _ in load_views(np.arange(20), 1)])

    assert torch.equal(views, views_of(config, [*range(20)], step=1)[0])


def test_views_that_were_yielded_are_not_overwritten(folder: Path) -> None:
    config = settings(folder, augmentation="none", augmentation_multiplicity=1)
    dataset = load_datasets(config).train.placed(CPU, num_workers=2)
    rows = torch.arange(20)
    kept = [images for images, _ in dataset.batches(rows, [2] * 10, device=CPU)]
    (whole,) = (images for images, _ in dataset.batches(rows, [20], device=CPU))

    assert torch.equal(torch.cat(kept), whole)


def test_random_parts_have_the_published_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    parts = np.array([random_part(400, 300, rng.random(22)) for _ in range(4000)])
    left, top, right, bottom = parts.T
    width, height = right - left, bottom - top
    area, aspect = width * height / 120_000, width / height

    assert left.min() == top.min() == 0  # corners are reached
    assert right.max() == 400
    assert bottom.max() == 300
    # Sides are whole pixels: off by one in 80 at most.
    assert 0.075 < area.min() < 0.09
    assert 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    # Small parts always fit, so among them area and log-aspect are uniform: the mean
    # of n uniforms is within four standard errors, span / sqrt(12 n), of the middle.
    small = area < 0.4
    error = 4 / np.sqrt(12 * small.sum())
    assert abs(area[small].mean() - 0.24) < 0.32 * error
    assert abs(np.log(aspect[small]).mean()) < 2 * np.log(4 / 3) * error


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 10), (193, 0, 206, 10)), ((10, 400), (0, 193, 10, 206))],
)
def test_where_no_attempt_fits_the_central_part_is_taken(
    size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    whole = np.full(22, 0.99)  # nearly all of the area never fits

    assert random_part(*size, whole) == expected
