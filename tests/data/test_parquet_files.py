"""Parquet files are found, read in order, once each, and refused when unfit."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from parquet_files import NAMES, encode, load, random_pixels, write, write_test

from dpsgd.config import DataConfig
from dpsgd.data.sources import load_datasets
from dpsgd.errors import ConfigError, DataError


@pytest.fixture
def shards(tmp_path: Path) -> tuple[np.ndarray, Path]:
    """Seven images in three shards, and a test file in another folder."""
    pixels = random_pixels(7)
    folder = tmp_path / "train"
    folder.mkdir()
    for index, part in enumerate(np.array_split(np.arange(7), 3)):
        images = [encode(pixels[row]) for row in part]
        write(folder / f"train-{index}.parquet", images, [row % 3 for row in part])
    write_test(tmp_path)
    return pixels, tmp_path


@pytest.mark.parametrize("form", ["list", "glob", "folder"])
def test_shards_are_read_in_order_from_every_form_of_path(
    shards: tuple[np.ndarray, Path], form: str
) -> None:
    pixels, root = shards
    train = {
        "list": tuple(str(root / "train" / f"train-{i}.parquet") for i in range(3)),
        "glob": str(root / "train" / "train-*.parquet"),
        "folder": str(root / "train"),
    }[form]
    splits = load(train, str(root / "test.parquet"))

    np.testing.assert_array_equal(splits.train.images, pixels.transpose(0, 3, 1, 2))
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert splits.train.class_names == splits.test.class_names == NAMES
    assert len(splits.test) == 2


def test_a_list_keeps_its_order(shards: tuple[np.ndarray, Path]) -> None:
    pixels, root = shards
    paths = [str(root / "train" / f"train-{i}.parquet") for i in (2, 0, 1)]
    splits = load(tuple(paths), str(root / "test.parquet"))

    expected = pixels[[5, 6, 0, 1, 2, 3, 4]].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(splits.train.images, expected)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    train = tmp_path / "a.parquet"
    images = [encode(one) for one in random_pixels(3)]
    write(train, images, [0, 1, 2])
    os.truncate(train, train.stat().st_size - 50)
    with pytest.raises(
        DataError, match=r"data\.train=.*a\.parquet: is not a readable parquet file"
    ):
        load(str(train), write_test(tmp_path))


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    train = tmp_path / "a.parquet"
    write(train, [encode(random_pixels(1, (64, 64, 3))[0])], [0])
    content = bytearray(train.read_bytes())
    content[4:60] = bytes(56)
    train.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: is not a readable parquet file"):
        load(str(train), write_test(tmp_path))


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    test = write_test(tmp_path)
    for pattern in ("none.parquet", "none-*.parquet"):
        with pytest.raises(DataError, match=r"data\.train=.*no such file; check"):
            load(str(tmp_path / pattern), test)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.train=.*folder without \.parquet"):
        load(str(tmp_path / "empty"), test)


def test_train_and_test_must_be_given(tmp_path: Path) -> None:
    test = write_test(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.train=null: must name the files"):
        load(None, test)
    with pytest.raises(ConfigError, match=r"data\.test=null: must name the files"):
        load_datasets(DataConfig(source="parquet", train=test))


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
def test_a_file_given_twice_is_refused(
    shards: tuple[np.ndarray, Path], make: Callable[[Path, Path], None]
) -> None:
    _, root = shards
    first = root / "train" / "train-0.parquet"
    link = root / "link.parquet"
    make(link, first)
    test = str(root / "test.parquet")
    for train in ((str(first), str(root / "train")), (str(first), str(link))):
        with pytest.raises(DataError, match=r"data\.train=.*is given twice"):
            load(train, test)


def test_a_folder_that_also_holds_the_test_file_is_refused(
    shards: tuple[np.ndarray, Path],
) -> None:
    _, root = shards
    test = write_test(root / "train")
    with pytest.raises(DataError, match=r"data\.test=.*given twice.*keep test files"):
        load(str(root / "train"), test)


def test_shards_with_other_classes_are_refused(tmp_path: Path) -> None:
    image = [encode(random_pixels(1)[0])]
    first = write(tmp_path / "a.parquet", image, [0])
    second = write(tmp_path / "b.parquet", image, [0], names=("dog", "cat", "owl"))
    with pytest.raises(DataError, match=r"b\.parquet: has other columns or classes"):
        load((first, second), write_test(tmp_path))
    with pytest.raises(DataError, match=r"data\.test=.*same order"):
        load(second, write_test(tmp_path))


def test_damaged_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"img": [b"x"], "label": [1]})
    for entry in ("{not json", '{"info": 3}'):
        damaged = table.replace_schema_metadata({"huggingface": entry})
        pyarrow.parquet.write_table(damaged, path)
        with pytest.raises(DataError, match=r"a\.parquet: has a damaged `huggingface`"):
            load(str(path), write_test(tmp_path))


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.parquet", [], [])
    with pytest.raises(DataError, match=r"data\.train=.*a\.parquet: holds no rows"):
        load(train, write_test(tmp_path))
