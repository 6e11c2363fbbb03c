"""Views from a store: the published transforms, however the work is spread."""

import dataclasses
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_images import CLASSES, damage, make_store, write_images
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from dpsgd.config import DataConfig
from dpsgd.data import (
    ImageDataset,
    Resizing,
    StoreDataset,
    ViewLoader,
    draw_views,
    load_datasets,
    normalize,
    num_decode_workers,
    open_source,
    prepare,
)
from dpsgd.data.store import Store, decoding
from dpsgd.data.store.framing import random_part
from dpsgd.errors import ConfigError, DataError
from dpsgd.evaluate import evaluate
from dpsgd.rng import RandomStreams

STREAMS = RandomStreams.from_seed(0)
CPU = torch.device("cpu")
SIZE = 10  # scaled_crop_flip cuts it from 12
AUGMENTATIONS = ["none", "flip", "scaled_crop_flip", "resized_crop_flip"]
IMAGES = (30, 23)  # width and height, give or take a pixel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, of 20 images and of 7, in a folder."""
    folder = tmp_path_factory.mktemp("stores")
    make_store(folder / "train", 20, size=IMAGES)
    make_store(folder / "test", 7, size=IMAGES, seed=1)
    return folder


def settings(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{
            "source": "store",
            "train": str(folder / "train"),
            "test": str(folder / "test"),
            "image_size": SIZE,
            "augmentation": "scaled_crop_flip",
            "augmentation_multiplicity": 3,
            "num_examples": 20,
            **changes,
        }
    )


def loader(config: DataConfig, *, workers: int = 0, microbatch: int = 4) -> ViewLoader:
    return ViewLoader(
        load_datasets(config).train.placed(CPU, num_workers=workers),
        config=config,
        streams=STREAMS,
        microbatch_size=microbatch,
        dtype=torch.float32,
        device=CPU,
    )


def views_of(
    config: DataConfig, draw: list[int], *, step: int = 7, **how: Any
) -> tuple[Tensor, Tensor]:
    """All views and labels of a draw, without padding."""
    parts = list(loader(config, **how)(np.array(draw, np.int64), step))
    mask = torch.cat([mask for _, _, mask in parts])
    views = torch.cat([views for views, _, _ in parts])[mask]
    return views, torch.cat([labels for _, labels, _ in parts])[mask]


def decoded(store: Store, row: int, folder: Path) -> Image.Image:
    path = folder / "one"
    path.write_bytes(store.read(row))
    with Image.open(path) as image:
        return image.convert("RGB")


def pixels(image: Image.Image, side: int) -> Tensor:
    """An image scaled as torchvision does it, channels first."""
    scaled = v2.functional.resize(image, [side, side], InterpolationMode.BICUBIC)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def central_square(image: Image.Image) -> Image.Image:
    """The square of the reference code, whose corner is rounded down."""
    short = min(image.size)
    left, top = ((side - short) // 2 for side in image.size)
    return image.crop((left, top, left + short, top + short))


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


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    alone = num_decode_workers("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    assert (alone, num_decode_workers("auto")) == (16, 4)
    assert num_decode_workers(3) == 3


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


@pytest.fixture(params=[0, 2], ids=["here", "in_workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Stores that a test may damage."""
    make_store(tmp_path / "train", 20, size=IMAGES)
    make_store(tmp_path / "test", 7, size=IMAGES)
    return tmp_path


def test_a_damaged_image_ends_the_step_by_its_index(own: Path, workers: int) -> None:
    store = Store(own / "train")
    damage(
        own / "train" / "shard-00000.bin", at=sum(len(store.read(i)) for i in (0, 1))
    )
    config = settings(own)

    views_of(config, [0, 1, 3], workers=workers)
    with pytest.raises(DataError, match=r"train, index 2: has a wrong checksum"):
        views_of(config, [0, 1, 2, 3], workers=workers)


def test_an_image_that_does_not_decode_is_named_and_never_replaced(
    own: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(own / "images", 9)
    (images / "dog" / "004.png").write_bytes(b"not an image")
    # As if it had been packed where it could still be decoded.
    monkeypatch.setattr(Resizing, "apply", lambda _, image: image.data.read_bytes())
    prepare(open_source(str(images)), own / "other", resizing=Resizing())
    config = settings(own, train=str(own / "other"))

    views_of(config, [3, 5], workers=workers)
    with pytest.raises(DataError, match=r"store=.*other, index 4: cannot be decoded"):
        views_of(config, [3, 4, 5], workers=workers)


def test_a_worker_that_dies_ends_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folder)
    views_of(config, [0], workers=2)
    for process in list(decoding._pool(2)._processes.values()):
        os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(ConfigError, match=r"decode_workers=2: a process .* has ended"):
        views_of(config, [*range(20)], workers=2)
    assert len(views_of(config, [0], workers=2)[0]) == 1  # with new processes


class Colours(torch.nn.Module):
    """Three logits from the mean of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.scale


def test_a_store_is_evaluated_like_the_same_pixels_in_memory(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    config = settings(folder, eval_image_size=8)
    dataset = load_datasets(config).test.placed(CPU, num_workers=workers)
    store = Store(folder / "test")
    held = []
    for row in range(len(store)):
        image = decoded(store, row, tmp_path)
        held.append(pixels(central_square(image), 8))
    in_memory = ImageDataset(
        images=torch.stack(held),
        labels=torch.from_numpy(store.labels),
        class_names=CLASSES,
    )
    model = Colours()
    one, two = (
        evaluate(
            model,
            dict(model.named_parameters()),
            each,
            normalize=lambda images: normalize(images, mean=(0.5,), std=(0.5,)),
            class_names=CLASSES,
            batch_size=3,
        )
        for each in (dataset, in_memory)
    )

    assert one == two
    assert one.num_examples == 7


def cases() -> Iterator[tuple[str, Callable[[Path], dict[str, Any]], str]]:
    yield "two", lambda f: {"train": (str(f / "train"), str(f / "test"))}, "given twice"
    yield "glob", lambda f: {"train": str(f / "t*n*")}, "must name one store; pack"
    yield "same", lambda f: {"test": str(f / "train")}, "is given twice"
    yield "none", lambda f: {"test": str(f / "no")}, "no such file"
    yield "images", lambda f: {"test": str(f / "test-images")}, "is not a store; make"


@pytest.mark.parametrize(
    ("changes", "told"), [case[1:] for case in cases()], ids=[c[0] for c in cases()]
)
def test_what_is_no_pair_of_stores_is_refused(
    folder: Path, changes: Callable[[Path], dict[str, Any]], told: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=rf"data\.t.*={'.*'}{told}"):
        load_datasets(settings(folder, **changes(folder)))


def test_stores_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 7)
    (images / "owl").rename(images / "pug")
    prepare(open_source(str(images)), tmp_path / "test", resizing=Resizing())
    told = r"data\.test=<3 classes>: .*, lacks owl, has besides pug; make the two"
    with pytest.raises(DataError, match=told):
        load_datasets(settings(folder, test=str(tmp_path / "test")))


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


def test_the_fingerprint_of_a_data_set_tells_images_and_classes(
    folder: Path, tmp_path: Path
) -> None:
    splits = load_datasets(settings(folder))
    moved = make_store(tmp_path / "elsewhere", 20, size=IMAGES)
    assert isinstance(splits.train, StoreDataset)
    same = dataclasses.replace(splits.train, store=moved)

    assert splits.train.fingerprint() == same.fingerprint()
    assert splits.train.fingerprint() != splits.test.fingerprint()


def test_images_have_keys_of_their_own(folder: Path) -> None:
    dataset = load_datasets(settings(folder)).train
    assert isinstance(dataset, StoreDataset)
    keys = dataset.image_keys()

    expected = [zlib.crc32(dataset.store.read(row)) for row in range(20)]
    assert keys.tolist() == expected
    pixels = torch.arange(36, dtype=torch.uint8).reshape(3, 3, 2, 2)
    twice = torch.cat([pixels, pixels[1:]])
    labels = torch.zeros(5, dtype=torch.int64)
    first, *others = ImageDataset(images=twice, labels=labels).image_keys().tolist()
    assert others == [*others[:2], *others[:2]]
    assert len({first, *others}) == 3
