import dataclasses
import hashlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits as load_bunch

from dpsgd.config import DataConfig
from dpsgd.data.facts import declared_num_examples
from dpsgd.data.sources import SOURCES, load_datasets
from dpsgd.errors import ConfigError, DataError


def test_digits_have_their_published_split_and_pixels() -> None:
    splits = load_datasets(DataConfig(source="digits"))
    config = DataConfig(source="digits")
    bunch = load_bunch()

    assert len(splits.train) == declared_num_examples(config, rows_held=0) == 1_437
    assert len(splits.test) == 360
    assert splits.train.image_shape == (1, 8, 8)
    assert splits.train.class_names == tuple("0123456789")
    assert splits.train.labels.tolist()[:4] == bunch.target[1:5].tolist()
    assert splits.test.labels.tolist() == bunch.target[::5].tolist()
    # 0 to 16 becomes 0 to 255: 8 is 127.5, which rounds to even.
    expected = np.array([round(value * 255 / 16) for value in range(17)])
    pixels = splits.test.images[:, 0].numpy()
    np.testing.assert_array_equal(pixels, expected[bunch.images[::5].astype(int)])


def test_every_source_that_can_be_configured_is_registered() -> None:
    (field,) = (one for one in dataclasses.fields(DataConfig) if one.name == "source")

    assert set(SOURCES) == set(get_args(field.type))


def write_batch(path: Path, images: np.ndarray, labels: list[int]) -> str:
    content = pickle.dumps({"data": images.reshape(len(images), -1), "labels": labels})
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def fake_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Writes CIFAR-10's files with 3 + 2 training images and 1 test image."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    first = write_batch(folder / "data_batch_1", images[:3], [0, 1, 2])
    second = write_batch(folder / "data_batch_2", images[3:5], [3, 9])
    test = write_batch(folder / "test_batch", images[5:], [4])
    names = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(names)
    fake = torchvision.datasets.CIFAR10
    sums = [["data_batch_1", first], ["data_batch_2", second]]
    meta = {**fake.meta, "md5": hashlib.md5(names).hexdigest()}
    monkeypatch.setattr(fake, "train_list", sums)
    monkeypatch.setattr(fake, "test_list", [["test_batch", test]])
    monkeypatch.setattr(fake, "meta", meta)
    return images


def test_cifar10_files_become_channels_first_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = fake_cifar10(tmp_path, monkeypatch)
    config = DataConfig(source="torchvision", name="cifar10", root=str(tmp_path))
    splits = load_datasets(config)

    np.testing.assert_array_equal(splits.train.images, images[:5])
    np.testing.assert_array_equal(splits.test.images, images[5:])
    assert splits.train.labels.tolist() == [0, 1, 2, 3, 9]
    assert splits.test.class_names[9] == "class 9"
    assert splits.train.images.is_contiguous()


@pytest.mark.parametrize(
    ("name", "class_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_grey_images_gain_a_channel(
    name: str, class_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(root: str, *, download: bool, train: bool) -> SimpleNamespace:
        data = torch.full((4 if train else 2, 28, 28), 7, dtype=torch.uint8)
        targets = torch.arange(len(data))
        return SimpleNamespace(data=data, targets=targets, classes=list("abcdefghij"))

    monkeypatch.setattr(torchvision.datasets, class_name, fake)
    splits = load_datasets(DataConfig(source="torchvision", name=name))

    assert splits.train.images.shape == (4, 1, 28, 28)
    assert splits.test.images.shape == (2, 1, 28, 28)
    assert splits.train.labels.tolist() == [0, 1, 2, 3]
    assert splits.train.class_names == tuple("abcdefghij")


def test_svhn_keeps_its_channels_and_has_the_digits_as_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)

    def fake(root: str, *, download: bool, split: str) -> SimpleNamespace:
        shown = pixels if split == "train" else pixels[:1]
        return SimpleNamespace(data=shown, labels=np.arange(len(shown)))

    monkeypatch.setattr(torchvision.datasets, "SVHN", fake)
    splits = load_datasets(DataConfig(source="torchvision", name="svhn"))

    np.testing.assert_array_equal(splits.train.images, pixels)
    assert len(splits.test) == 1
    assert splits.train.class_names == tuple("0123456789")


def test_a_failed_download_says_what_to_do_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens on the discard port, so the connection is refused at once.
    url = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    config = DataConfig(source="torchvision", name="cifar10", root=str(tmp_path))
    with pytest.raises(
        DataError, match=r"data\.root=.*does not hold cifar10.*; put the archive there"
    ):
        load_datasets(config)


@pytest.mark.parametrize(
    ("name", "remedy"), [("cifar01", "did you mean `cifar10`"), (None, "choose one")]
)
def test_an_unknown_name_is_refused_with_the_nearest(
    name: str | None, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.name=.*must be one of.*{remedy}"):
        load_datasets(DataConfig(source="torchvision", name=name))


def test_processes_of_one_machine_do_not_download_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(root: str, **_: object) -> None:
        with (tmp_path / "now").open("x"):  # fails if another is at it
            time.sleep(0.1)
        (tmp_path / "now").unlink()
        raise OSError("offline")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unpack)
    config = DataConfig(source="torchvision", name="cifar10", root=str(tmp_path))

    def load(_: int) -> str:
        with pytest.raises(DataError) as error:
            load_datasets(config)
        return str(error.value)

    with ThreadPoolExecutor(3) as pool:
        messages = list(pool.map(load, range(3)))
    assert all("offline" in message for message in messages)
