"""What is left of a set is as it was, and what was not finished is not there."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from made_up_images import write_images
from small_runs import write_parquet
from unwilling_disks import full_disk

from dpsgd.data import leave_out, open_source
from dpsgd.data.files import EncodedImage
from dpsgd.data.store import ImageSource
from dpsgd.errors import DataError

CODECS = {"img.bytes": "NONE", "img.path": "SNAPPY", "label": "GZIP", "owner": "ZSTD"}


@pytest.fixture
def images(tmp_path: Path) -> ImageSource:
    """Twelve image files in three class folders, four in each."""
    return open_source(str(write_images(tmp_path / "images", 12)))


@pytest.fixture
def tables(tmp_path: Path) -> ImageSource:
    """Files of 7 and 5 rows, in row groups of 3 and a codec for each column."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, count in (("a", 7), ("b", 5)):
        owners = [f"{name}{row}" for row in range(count)]
        path = Path(write_parquet(folder / f"{name}.parquet", owner=owners))
        pa.parquet.write_table(
            pa.parquet.read_table(path),
            path,
            row_group_size=3,
            compression=CODECS,
        )
    return open_source(str(folder))


def contents(source: ImageSource) -> list[bytes]:
    return [image.content() for image in source.encoded(0)]


def layout(path: Path) -> list[Any]:
    """Rows of each row group, and codec of each of its columns."""
    metadata = pa.parquet.read_metadata(path)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [
        (
            group.num_rows,
            [group.column(index).compression for index in range(group.num_columns)],
        )
        for group in groups
    ]


@pytest.mark.parametrize("kind", ["images", "tables"])
def test_all_other_images_stay_in_their_order(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: ImageSource = request.getfixturevalue(kind)
    out = tmp_path / "deep" / "out"
    leave_out(source, [0, 8, 11], out, note={"rows": 3})
    left = open_source(str(out))
    kept = [row for row in range(12) if row not in (0, 8, 11)]

    assert contents(left) == [contents(source)[row] for row in kept]
    np.testing.assert_array_equal(left.labels, source.labels[kept])
    assert left.class_names == source.class_names
    files = [path.relative_to(source.root) for path in source.files]
    expected = [files[row] for row in kept] if source.is_folder else files
    assert [path.relative_to(out) for path in left.files] == expected
    assert (out / "left_out.json").read_text() == '{\n "rows": 3\n}'
    assert not (tmp_path / "deep" / "out.part").exists()
    assert not any(path.is_symlink() for path in left.files)


def test_parquet_files_keep_columns_row_groups_codecs_and_metadata(
    tables: ImageSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    leave_out(tables, [3, 4, 5, 7, 9], out, note={})

    for name, kept in (("a", [0, 1, 2, 6]), ("b", [1, 3, 4])):
        before = pa.parquet.read_table(tables.root / f"{name}.parquet")
        after = pa.parquet.read_table(out / f"{name}.parquet")
        assert after.equals(before.take(kept))
        assert after.schema.equals(before.schema, check_metadata=True)
    codecs = ["UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD"]
    assert layout(out / "a.parquet") == [(3, codecs), (1, codecs)]
    assert layout(out / "b.parquet") == [(1, codecs), (2, codecs)]


def test_a_file_may_lose_all_its_rows_and_stays(
    tables: ImageSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    leave_out(tables, range(7), out, note={})

    assert pa.parquet.read_metadata(out / "a.parquet").num_rows == 0
    assert contents(open_source(str(out))) == contents(tables)[7:]
    again = tmp_path / "again"
    leave_out(open_source(str(out)), [4], again, note={})
    assert contents(open_source(str(again))) == contents(tables)[7:11]


def test_one_row_group_is_held_at_a_time(
    tables: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = pa.parquet.ParquetFile.read_row_group

    def noted(self: Any, group: int) -> Any:
        read.append(group)
        return whole(self, group)

    monkeypatch.setattr(pa.parquet.ParquetFile, "read_row_group", noted)
    monkeypatch.delattr(pa.parquet.ParquetFile, "read")
    leave_out(tables, [1], tmp_path / "out", note={})

    assert read == [0, 1, 2, 0, 1]


def test_files_of_one_name_in_several_folders_stay_apart(tmp_path: Path) -> None:
    for folder, count in (("x", 4), ("y", 5)):
        (tmp_path / "set" / folder).mkdir(parents=True)
        write_parquet(tmp_path / "set" / folder / "train.parquet", owner=["x"] * count)
    source = open_source(str(tmp_path / "set" / "*" / "train.parquet"))
    leave_out(source, [5], tmp_path / "out", note={})

    left = open_source(str(tmp_path / "out" / "*" / "train.parquet"))
    assert contents(left) == contents(source)[:5] + contents(source)[6:]
    with pytest.raises(DataError, match="lies inside PUBLIC"):
        leave_out(source, [5], tmp_path / "set" / "z", note={})


@pytest.mark.parametrize("kind", ["images", "tables"])
def test_a_full_disk_leaves_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: ImageSource = request.getfixturevalue(kind)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    # Some files are smaller: the fault comes in the middle.
    with full_disk(300), pytest.raises(DataError) as caught:
        leave_out(source, [0], out, note={})

    assert str(caught.value) == (
        f"--out={out}: the disk is full; make room, or name a folder elsewhere; "
        "nothing was left"
    )
    assert sorted(tmp_path.rglob("*")) == before
    leave_out(source, [0], out, note={})
    assert contents(open_source(str(out))) == contents(source)[1:]


def test_an_interrupted_write_has_another_name_and_is_removed(
    images: ImageSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def interrupted(start: int) -> Iterator[EncodedImage]:
        yield from list(images.encoded(start))[:6]
        assert len(list((tmp_path / "out.part").rglob("*.*"))) == 5
        assert not out.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave_out(dataclasses.replace(images, encoded=interrupted), [1], out, note={})
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_what_a_killed_process_left_is_told(
    images: ImageSource, tmp_path: Path
) -> None:
    partial = tmp_path / "out.part"
    partial.mkdir()
    with pytest.raises(DataError, match=rf"begun in {partial}, .*; remove that, or"):
        leave_out(images, [1], tmp_path / "out", note={})

    assert list(partial.iterdir()) == []


def test_nothing_that_is_there_is_overwritten(
    images: ImageSource, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "link", "file"):
        with pytest.raises(DataError, match=f"{name}: is there already, and nothing"):
            leave_out(images, [1], tmp_path / name, note={})

    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_inside_the_set_is_refused(
    images: ImageSource, tables: ImageSource, tmp_path: Path
) -> None:
    (tmp_path / "alias").symlink_to(images.root)
    for out in (images.root / "out", tmp_path / "alias" / "deep" / "out"):
        with pytest.raises(DataError, match="out: lies inside PUBLIC, and would be"):
            leave_out(images, [1], out, note={})
    leave_out(images, [1], tmp_path / "images2", note={})

    # Parquet files are found beside each other, so a folder there is none of them.
    leave_out(tables, [1], tables.root / "out", note={})
    assert contents(open_source(str(tables.root))) == contents(tables)


def test_a_set_or_a_class_without_images_is_refused(
    images: ImageSource, tables: ImageSource, tmp_path: Path
) -> None:
    dogs = np.flatnonzero(images.labels == 1).tolist()
    with pytest.raises(DataError, match="would lose its class `dog`, and later ones"):
        leave_out(images, dogs, tmp_path / "out", note={})
    with pytest.raises(DataError, match="would hold no image: all are to be left out"):
        leave_out(tables, range(12), tmp_path / "out", note={})
    assert not (tmp_path / "out").exists()

    # Classes that a file declares stay without images, and others keep their labels.
    leave_out(tables, np.flatnonzero(tables.labels == 0), tmp_path / "out", note={})
    left = open_source(str(tmp_path / "out"))
    assert left.class_names == tables.class_names
    np.testing.assert_array_equal(left.labels, tables.labels[tables.labels > 0])


def test_a_file_that_was_damaged_meanwhile_is_named(
    tables: ImageSource, tmp_path: Path
) -> None:
    tables.files[1].write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=f"PUBLIC={tables.files[1]}: is not a readable"):
        leave_out(tables, [1], tmp_path / "out", note={})

    assert [path.name for path in tmp_path.iterdir()] == ["tables"]
