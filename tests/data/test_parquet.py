import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dpsgd.config import DataConfig
from dpsgd.data import files
from dpsgd.data.dataset import DataSplits
from dpsgd.data.sources import load_datasets
from dpsgd.errors import ConfigError, DataError

NAMES = ("cat", "dog", "owl")


def random_pixels(
    count: int, size: tuple[int, ...] = (6, 5, 3), seed: int = 0
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *size), dtype=np.uint8)


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, image_format, lossless=True)
    return stream.getvalue()


def write(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    names: Sequence[str] | None = NAMES,
    image: str = "img",
    label: str = "label",
    plain: bool = False,
    more: dict[str, Any] | None = None,
) -> str:
    """Writes a file as `datasets` does, and returns its path."""
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = images if plain else [{"bytes": b, "path": "x"} for b in images]
    columns = {
        image: pa.array(cells, pa.binary() if plain else struct),
        label: pa.array(labels, pa.int64()),
        **(more or {}),
    }
    features = {image: {"_type": "Image"}}
    if names is not None:
        features[label] = {"names": list(names), "_type": "ClassLabel"}
    info = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def write_test(folder: Path, **options: Any) -> str:
    images = [encode(pixels) for pixels in random_pixels(2, seed=9)]
    return write(folder / "test.parquet", images, [0, 1], **options)


def load(train: Any, test: str, **settings: Any) -> DataSplits:
    return load_datasets(
        DataConfig(source="parquet", train=train, test=test, **settings)
    )


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


def test_without_declared_classes_none_are_derived_from_the_labels(
    tmp_path: Path,
) -> None:
    images = [encode(one) for one in random_pixels(2)]
    train = write(tmp_path / "a.parquet", images, [0, 7], names=None)
    splits = load(train, write_test(tmp_path, names=None))

    assert splits.train.class_names == ()
    assert splits.train.labels.tolist() == [0, 7]


def test_a_file_without_metadata_declares_no_classes(tmp_path: Path) -> None:
    train = tmp_path / "a.parquet"
    table = pa.table({"pixels": [encode(random_pixels(1)[0])], "digit": [3]})
    pyarrow.parquet.write_table(table.cast(pa.schema(table.schema)), train)
    splits = load(str(train), write_test(tmp_path, names=None))

    assert splits.train.labels.tolist() == [3]


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


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_classes_is_named_with_file_and_row(
    tmp_path: Path, label: int
) -> None:
    images = [encode(one) for one in random_pixels(3)]
    good = write(tmp_path / "a.parquet", images, [0, 1, 2])
    bad = write(tmp_path / "b.parquet", images, [0, 1, label])
    with pytest.raises(
        DataError,
        match=rf"data\.train=.*b\.parquet, row 2: has label {label}, which must be in "
        r"\[0, 3\); correct",
    ):
        load((good, bad), write_test(tmp_path))


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


def test_ambiguous_columns_are_refused_and_the_candidates_named(tmp_path: Path) -> None:
    images = [encode(one) for one in random_pixels(2)]
    more = {"coarse": pa.array([1, 0]), "thumb": pa.array(images, pa.binary())}
    train = write(tmp_path / "a.parquet", images, [0, 1], more=more)
    test = write(tmp_path / "b.parquet", images, [0, 1], more=more)
    with pytest.raises(ConfigError, match=r"label_column=null.*tes: label, coarse"):
        load(train, test)
    with pytest.raises(ConfigError, match=r"image_column=null.*tes: img, thumb"):
        load(train, test, label_column="coarse")

    splits = load(train, test, label_column="coarse", image_column="thumb")
    assert splits.train.labels.tolist() == [1, 0]
    # Names were declared for the other label column only.
    assert splits.train.class_names == ()


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    test = write_test(tmp_path)
    train = write(tmp_path / "a.parquet", [encode(random_pixels(1)[0])], [0])
    with pytest.raises(ConfigError, match=r"data\.label_column=fine.*ates: label"):
        load(train, test, label_column="fine")
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pa.table({"label": [1]}), path)
    with pytest.raises(ConfigError, match=r"image_column=null.*candidates: none"):
        load(str(path), test)


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


def test_labels_of_any_integer_type_become_int64(tmp_path: Path) -> None:
    table = pa.table(
        {
            "img": [encode(random_pixels(1)[0])] * 2,
            "label": pa.array([0, 200], pa.uint8()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    splits = load(str(tmp_path / "a.parquet"), write_test(tmp_path, names=None))

    assert splits.train.labels.dtype == torch.int64
    assert splits.train.labels.tolist() == [0, 200]


def train_of_users(folder: Path, users: list[Any], *, name: str = "a") -> str:
    """A training file whose column `owner` says whose each row is."""
    images = [encode(one) for one in random_pixels(len(users))]
    column = users if isinstance(users, pa.Array) else pa.array(users)
    path = folder / f"{name}.parquet"
    return write(path, images, [0] * len(users), more={"owner": column})


@pytest.mark.parametrize(
    "column",
    [
        pa.array([7, 3, 7, 2**63], pa.uint64()),
        pa.array(["b", "a", "b", "c"]),
        pa.array(["b", "a", "b", "c"], pa.large_string()),
        pa.array(["b", "a", "b", "c"]).dictionary_encode(),
    ],
    ids=["integers", "text", "large_text", "dictionary"],
)
def test_users_are_numbered_in_the_order_in_which_they_occur(
    tmp_path: Path, column: Any
) -> None:
    train = train_of_users(tmp_path, column)
    splits = load(train, write_test(tmp_path), user_column="owner")

    assert splits.train.users is not None
    assert splits.train.users.tolist() == [0, 1, 0, 2]
    assert splits.test.users is None  # a test file needs no such column


def test_a_user_is_the_same_in_every_shard_whatever_its_type(tmp_path: Path) -> None:
    train = (
        train_of_users(tmp_path, [4, 5]),
        train_of_users(tmp_path, ["5", "6"], name="b"),
    )
    users = load(train, write_test(tmp_path), user_column="owner").train.users

    assert users is not None
    assert users.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("missing", [None, ""])
def test_a_row_without_a_user_is_named(tmp_path: Path, missing: str | None) -> None:
    train = train_of_users(tmp_path, ["a", "b", missing])
    with pytest.raises(DataError, match=r"a\.parquet, row 2: has no user, and the gua"):
        load(train, write_test(tmp_path), user_column="owner")


def test_a_column_of_users_that_is_not_there_or_unfit_is_refused(
    tmp_path: Path,
) -> None:
    test = write_test(tmp_path)
    train = train_of_users(tmp_path, ["a", "b"])
    rule = r"must name the column of integers or text in .*a\.parquet; candidates: "
    with pytest.raises(ConfigError, match=rf"user_column=owners: {rule}label, owner"):
        load(train, test, user_column="owners")
    train = train_of_users(tmp_path, [0.5, float("nan")])
    with pytest.raises(ConfigError, match=rf"user_column=owner: {rule}label"):
        load(train, test, user_column="owner")


def test_integer_users_are_not_taken_for_labels(tmp_path: Path) -> None:
    train = train_of_users(tmp_path, [10, 11, 11])
    splits = load(train, write_test(tmp_path), user_column="owner")

    assert splits.train.labels.tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match=r"label_column=null.*tes: label, owner"):
        load(train, write_test(tmp_path))


def grouped_test(folder: Path, column: Any, *, name: str = "grouped") -> str:
    """A test file whose column `age` says to which group each row belongs."""
    images = [encode(one) for one in random_pixels(len(column))]
    path = folder / f"{name}.parquet"
    return write(path, images, [0] * len(column), more={"age": column})


@pytest.mark.parametrize(
    ("column", "groups", "names"),
    [
        (pa.array([10, 9, 10, None]), [1, 0, 1, 2], ("9", "10", "(missing)")),
        (pa.array(["old", "a", "old"]), [1, 0, 1], ("a", "old")),
        (pa.array([True, False, True]), [1, 0, 1], ("False", "True")),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
    ],
    ids=["integers", "text", "booleans", "dictionary"],
)
def test_groups_of_the_test_set_are_sorted_by_name(
    tmp_path: Path, column: Any, groups: list[int], names: tuple[str, ...]
) -> None:
    train = write(tmp_path / "a.parquet", [encode(random_pixels(1)[0])], [0])
    splits = load(train, grouped_test(tmp_path, column), group_column="age")

    assert splits.test.groups is not None
    assert splits.test.groups.tolist() == groups
    assert splits.test.group_names == names
    assert splits.train.groups is None  # a training file needs no such column


def test_groups_are_joined_over_shards_whatever_their_type(tmp_path: Path) -> None:
    train = write(tmp_path / "a.parquet", [encode(random_pixels(1)[0])], [0])
    shards = (
        grouped_test(tmp_path, pa.array([2, 1])),
        grouped_test(tmp_path, pa.array(["x", "2"]), name="more"),
    )
    test = load(train, shards, group_column="age").test

    assert test.group_names == ("1", "2", "x")
    assert test.groups is not None
    assert test.groups.tolist() == [1, 0, 2, 1]


def test_a_column_of_groups_that_is_not_there_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.parquet", [encode(random_pixels(1)[0])], [0])
    rule = r"integers, text or booleans in .*; candidates: label"
    with pytest.raises(ConfigError, match=rf"data\.group_column=age: .*{rule}"):
        load(train, write_test(tmp_path), group_column="age")


def test_columns_of_users_and_groups_are_no_labels_in_either_split(
    tmp_path: Path,
) -> None:
    images = [encode(one) for one in random_pixels(2)]
    more = {"age": pa.array([30, 40]), "owner": pa.array([7, 8])}
    train = write(tmp_path / "a.parquet", images, [0, 1], more=more)
    test = write(tmp_path / "b.parquet", images, [1, 0], more=more)
    splits = load(train, test, user_column="owner", group_column="age")

    assert splits.train.labels.tolist() == [0, 1]
    assert splits.test.labels.tolist() == [1, 0]
    assert (splits.train.groups, splits.test.users) == (None, None)
