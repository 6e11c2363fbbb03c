from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dpsgd.config import DataConfig
from dpsgd.data.dataset import DataSplits
from dpsgd.data.sources import load_datasets
from dpsgd.errors import ConfigError, DataError


def write_image(path: Path, value: int, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value + 1, value + 2)).save(path)


def load(train: str | tuple[str, ...] | None, test: str | None) -> DataSplits:
    return load_datasets(DataConfig(source="image_folder", train=train, test=test))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index, name in enumerate(["train/dog/b.png", "train/dog/a.png"]):
        write_image(tmp_path / name, 10 * index)
    write_image(tmp_path / "train/cat/deep/er/z.BMP", 20)
    write_image(tmp_path / "test/cat/1.png", 30)
    write_image(tmp_path / "test/dog/1.png", 40)
    return tmp_path


def test_classes_and_images_are_sorted_by_name(root: Path) -> None:
    splits = load(str(root / "train"), str(root / "test"))

    assert splits.train.class_names == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 1, 1]
    assert splits.train.images[:, 0, 0, 0].tolist() == [20, 10, 0]
    assert splits.train.images[0, :, 2, 3].tolist() == [20, 21, 22]
    assert splits.train.image_shape == (3, 3, 4)
    assert splits.test.labels.tolist() == [0, 1]


def test_several_roots_are_joined(root: Path) -> None:
    write_image(root / "train2/ape/x.png", 50)
    write_image(root / "train2/dog/x.png", 60)
    write_image(root / "test/ape/x.png", 70)
    for train in (
        (str(root / "train"), str(root / "train2")),
        str(root / "train*"),
    ):
        splits = load(train, str(root / "test"))
        assert splits.train.class_names == ("ape", "cat", "dog")
        assert splits.train.labels.tolist() == [1, 2, 2, 0, 2]
        assert splits.train.images[:, 0, 0, 0].tolist() == [20, 10, 0, 50, 60]


def test_hidden_files_and_other_files_are_left_out(root: Path) -> None:
    (root / "train/dog/notes.txt").write_text("not an image")
    (root / "train/dog/._a.png").write_bytes(b"not an image")
    (root / "train/.cache").mkdir()

    splits = load(str(root / "train"), str(root / "test"))
    assert len(splits.train) == 3
    assert splits.train.class_names == ("cat", "dog")


def test_classes_of_one_split_only_are_listed(root: Path) -> None:
    write_image(root / "train/ape/x.png", 50)
    write_image(root / "test/bee/x.png", 60)
    with pytest.raises(DataError, match=r"data\.test=.*lacks ape, has besides bee"):
        load(str(root / "train"), str(root / "test"))


def test_a_class_without_images_is_refused(root: Path) -> None:
    (root / "test/cow").mkdir()
    with pytest.raises(DataError, match=r"data\.test=.*cow: is a class folder without"):
        load(str(root / "train"), str(root / "test"))


def test_a_folder_of_images_without_classes_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train=.*dog: must be a folder that"):
        load(str(root / "train/dog"), str(root / "test"))
    with pytest.raises(DataError, match=r"a\.png: must be a folder that holds"):
        load(str(root / "train/dog/a.png"), str(root / "test"))


def test_a_corrupt_image_is_named(root: Path) -> None:
    (root / "train/dog/c.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"data\.train=.*dog/c\.png: cannot be decoded"):
        load(str(root / "train"), str(root / "test"))


def test_an_image_of_another_size_is_named(root: Path) -> None:
    write_image(root / "train/dog/c.png", 1, size=(9, 8))
    with pytest.raises(DataError, match=r"dog/c\.png: is 9x8 pixels.*4x3; resize"):
        load(str(root / "train"), str(root / "test"))


def test_missing_folders_and_settings_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train=.*absent: no such file"):
        load(str(root / "absent"), str(root / "test"))
    with pytest.raises(ConfigError, match=r"data\.train=null"):
        load(None, str(root / "test"))
    with pytest.raises(ConfigError, match=r"data\.test=null"):
        load(str(root / "train"), None)


def test_one_folder_for_training_and_test_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.test=.*given twice"):
        load(str(root / "train"), str(root / "train"))


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_is_held_twice_is_refused(
    root: Path, split: str, make: Callable[[Path, Path], None]
) -> None:
    make(root / split / "dog" / "again.png", root / "train" / "dog" / "a.png")

    with pytest.raises(DataError, match=rf"data\.{split}=.*again\.png: is held twice"):
        load(str(root / "train"), str(root / "test"))


def test_a_link_to_no_file_is_named(root: Path) -> None:
    (root / "train" / "dog" / "c.png").symlink_to(root / "nothing.png")

    with pytest.raises(DataError, match=r"data\.train=.*c\.png: cannot be read \(No"):
        load(str(root / "train"), str(root / "test"))
