"""Stores as data sets: evaluated, told apart, and refused when damaged or unfit."""

import dataclasses
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_images import CLASSES, damage, make_store, write_images
from store_views import (
    CPU,
    IMAGES,
    central_square,
    decoded,
    pixels,
    settings,
    two_stores,
    views_of,
)
from torch import Tensor

from dpsgd.data import (
    ImageDataset,
    Resizing,
    StoreDataset,
    load_datasets,
    normalize,
    num_decode_workers,
    open_source,
    prepare,
)
from dpsgd.data.store import Store, decoding
from dpsgd.errors import ConfigError, DataError
from dpsgd.evaluate import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_stores(tmp_path_factory.mktemp("stores"))


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    alone = num_decode_workers("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    assert (alone, num_decode_workers("auto")) == (16, 4)
    assert num_decode_workers(3) == 3


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
