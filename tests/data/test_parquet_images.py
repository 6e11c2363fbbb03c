"""Images of parquet files are decoded exactly, or named by file and row."""

import io
from pathlib import Path

import numpy as np
import pytest
from parquet_files import encode, load, random_pixels, write, write_test
from PIL import Image

from dpsgd.data import files
from dpsgd.errors import DataError


def test_plain_binary_columns_are_images_too(tmp_path: Path) -> None:
    pixels = random_pixels(3)
    images = [encode(one, "WEBP") for one in pixels]
    train = write(tmp_path / "a.parquet", images, [0, 1, 2], plain=True)
    splits = load(train, write_test(tmp_path))

    np.testing.assert_array_equal(splits.train.images, pixels.transpose(0, 3, 1, 2))


def test_many_rows_and_large_images_are_decoded_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MIN_PIXELS_FOR_THREADS", 1)
    monkeypatch.setattr(files, "_TASKS_AT_ONCE", 3)
    pixels = random_pixels(1_500, (2, 2, 3))
    train = write(tmp_path / "a.parquet", [encode(one) for one in pixels], [0] * 1_500)
    small = [encode(one) for one in random_pixels(2, (2, 2, 3))]
    test = write(tmp_path / "b.parquet", small, [0, 1])

    expected = pixels.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(load(train, test).train.images, expected)
    monkeypatch.setattr(files, "_MIN_PIXELS_FOR_THREADS", 10**9)
    np.testing.assert_array_equal(load(train, test).train.images, expected)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    pixels = random_pixels(3, (4, 4))
    images = [encode(one) for one in pixels]
    train = write(tmp_path / "a.parquet", images, [0, 1, 2])
    test = write(tmp_path / "b.parquet", images[:1], [0])
    splits = load(train, test)

    np.testing.assert_array_equal(splits.train.images[:, 0], pixels)
    assert splits.train.image_shape == (1, 4, 4)


def test_a_grey_image_among_colour_images_is_widened(tmp_path: Path) -> None:
    colour, grey = random_pixels(1)[0], random_pixels(1, (6, 5))[0]
    images = [encode(colour), encode(grey, "JPEG")]
    train = write(tmp_path / "a.parquet", images, [0, 1])
    second = load(train, write_test(tmp_path)).train.images[1]

    decoded = np.asarray(Image.open(io.BytesIO(images[1])))
    np.testing.assert_array_equal(second, np.stack([decoded] * 3))


def test_a_colour_image_after_a_grey_one_is_refused(tmp_path: Path) -> None:
    images = [encode(random_pixels(1, (6, 5))[0]), encode(random_pixels(1)[0])]
    train = write(tmp_path / "a.parquet", images, [0, 1])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: is not grey \(mode RGB\)"):
        load(train, write_test(tmp_path))


def test_deep_pixels_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    deep = encode(np.full((6, 5), 40_000, np.uint16))
    train = write(tmp_path / "a.parquet", [deep], [0])
    with pytest.raises(DataError, match=r"row 0: has pixels of more than 8 bits"):
        load(train, write_test(tmp_path))


def test_a_missing_label_or_image_is_named_with_its_row(tmp_path: Path) -> None:
    images = [encode(one) for one in random_pixels(2)]
    train = write(tmp_path / "a.parquet", images, [0, None])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: has no label; label"):
        load(train, write_test(tmp_path))
    train = write(tmp_path / "b.parquet", [*images, None], [0, 1, 2])
    with pytest.raises(DataError, match=r"b\.parquet, row 2: has no image bytes; st"):
        load(train, write_test(tmp_path))


@pytest.mark.parametrize("row", [0, 1, 70])
def test_a_corrupt_image_is_named_with_file_and_row(tmp_path: Path, row: int) -> None:
    images = [encode(random_pixels(1)[0])] * 80
    images[row] = b"not an image"
    train = write(tmp_path / "a.parquet", images, [0] * 80)
    with pytest.raises(DataError, match=rf"a\.parquet, row {row}: cannot be decoded"):
        load(train, write_test(tmp_path))


def test_an_image_cut_short_is_named(tmp_path: Path) -> None:
    images = [encode(one) for one in random_pixels(3, (64, 64, 3))]
    images[2] = images[2][:-2_000]
    train = write(tmp_path / "a.parquet", images, [0, 1, 2])
    with pytest.raises(DataError, match=r"a\.parquet, row 2: cannot be decoded"):
        load(train, write_test(tmp_path))


def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    images = [encode(one) for one in random_pixels(2)]
    images.append(encode(random_pixels(1, (6, 8, 3))[0]))
    train = write(tmp_path / "a.parquet", images, [0, 1, 2])
    with pytest.raises(
        DataError, match="row 2: is 8x6 pixels, and the first image is 5x6; resize"
    ):
        load(train, write_test(tmp_path))
