"""Columns of parquet files that say the label, the user and the group of a row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from parquet_files import encode, load, random_pixels, write, write_test

from dpsgd.errors import ConfigError, DataError


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
