"""Stores: what goes in comes out, and a kill at any moment harms nothing."""

import itertools
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from made_up_images import CLASSES, make_store, write_images
from PIL import Image
from small_runs import ROOT, write_parquet

from dpsgd.data import Resizing, Store, open_source, prepare
from dpsgd.data.store import StoreWriter, preparing, writing
from dpsgd.errors import ConfigError, DataError


def pack(source: Path | str, store: Path, **options: Any) -> Store:
    resizing = options.pop("resizing", Resizing())
    prepare(open_source(str(source)), store, resizing=resizing, **options)
    return Store(store)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 10)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", 10).path


def test_a_store_holds_the_files_of_class_folders_byte_for_byte(
    tmp_path: Path, images: Path
) -> None:
    store = pack(images, tmp_path / "store")
    paths = sorted(path for path in images.rglob("*") if path.is_file())

    assert store.manifest.class_names == CLASSES
    assert [CLASSES[label] for label in store.labels] == [p.parent.name for p in paths]
    assert [store.read(index) for index in range(len(store))] == [
        path.read_bytes() for path in paths
    ]
    names = {path.name for path in store.path.iterdir()}
    assert names == {"manifest.json", "records.bin", "shard-00000.bin"}


def test_a_store_of_parquet_files_holds_their_images(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 4)):
        write_parquet(tmp_path / f"{name}.parquet", owner=["x"] * count)
    store = pack(str(tmp_path / "*.parquet"), tmp_path / "store")

    assert store.manifest.class_names == CLASSES
    assert store.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert all(store.read(index).startswith(b"\x89PNG") for index in range(7))
    source = open_source(str(tmp_path / "*.parquet"))
    later = [image.place for image in source.encoded(2)]
    assert [place.split("/")[-1] for place in later] == [
        "a.parquet, row 2",
        *(f"b.parquet, row {row}" for row in range(4)),
    ]


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
def test_a_file_under_two_names_is_not_packed_twice(
    tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    write_parquet(tmp_path / "a.parquet", owner=["x"] * 3)
    make(tmp_path / "b.parquet", tmp_path / "a.parquet")

    for source in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(DataError, match=r"SOURCE=.*b\.parquet: is held twice"):
            open_source(str(source))


def test_a_digest_of_content_is_of_the_images_in_their_order_alone(
    tmp_path: Path, images: Path
) -> None:
    held = open_source(str(images))
    encoded = [image.content() for image in held.encoded(0)]

    def digest(*sizes: int, cells: list[bytes] = encoded) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        ends = list(itertools.accumulate(sizes, initial=0))
        for index, (start, end) in enumerate(itertools.pairwise(ends)):
            table = pa.table({"img": cells[start:end], "label": [0] * (end - start)})
            pa.parquet.write_table(table, folder / f"{index}.parquet")
        return open_source(str(folder)).content_sha256()

    count = len(encoded)
    assert held.content_sha256() == digest(count) == digest(2, count - 2)
    others = [
        encoded[::-1],
        [encoded[0] + encoded[1][:1], encoded[1][1:], *encoded[2:]],
        [*encoded[:-1], encoded[-1] + b"x"],
    ]
    assert held.content_sha256() not in [digest(count, cells=one) for one in others]


def test_an_image_that_went_away_is_named(images: Path) -> None:
    source = open_source(str(images), field="PUBLIC")
    source.files[3].unlink()

    with pytest.raises(DataError, match=f"PUBLIC={source.files[3]}: cannot be read"):
        source.content_sha256()


def test_the_example_writes_class_folders_of_the_same_images(tmp_path: Path) -> None:
    source, folder = (
        write_parquet(tmp_path / "a.parquet", owner=["x"] * 7),
        tmp_path / "b",
    )
    command = [sys.executable, ROOT / "examples" / "image_folder.py", source, folder]
    first = [*command, "--classes", "2"]

    assert subprocess.run(first, check=False).returncode == 0
    packed, whole = pack(folder, tmp_path / "store"), open_source(source)
    assert packed.manifest.class_names == CLASSES[:2]
    assert packed.labels.tolist() == [0, 0, 0, 1, 1]
    images = [image.data for image in whole.encoded(0)]
    expected = [images[row] for row in (0, 3, 6, 1, 4)]
    assert [packed.read(index) for index in range(5)] == expected
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_shards_are_opened_when_one_is_full(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(images, tmp_path / "whole")
    monkeypatch.setattr(writing, "SHARD_BYTES", 1000)
    parts = pack(images, tmp_path / "parts")

    assert len(parts.manifest.shards) > 2
    assert max(parts.manifest.shards) <= 1000
    assert [parts.read(i) for i in range(10)] == [whole.read(i) for i in range(10)]


def test_large_images_are_made_smaller_and_others_are_left(tmp_path: Path) -> None:
    for index, size in enumerate([(40, 30), (30, 60), (20, 30)]):
        path = write_images(tmp_path / "images", 0) / "cat" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9, 99, 199)).save(path)
    resizing = Resizing(short_side=20, quality=90)
    store = pack(tmp_path / "images", tmp_path / "store", resizing=resizing)
    sizes = []
    for index in range(3):
        (tmp_path / "one").write_bytes(store.read(index))
        with Image.open(tmp_path / "one") as image:
            sizes.append((image.size, image.format))

    assert sizes == [((27, 20), "JPEG"), ((20, 40), "JPEG"), ((20, 30), "PNG")]
    assert store.manifest.options == {"short_side": 20, "quality": 90}


@pytest.mark.parametrize(
    "options",
    [
        {"short_side": 0, "quality": 90},
        {"short_side": 9},
        {"quality": 90},
        {"short_side": 9, "quality": 96},
        {"short_side": 9, "quality": 0},
    ],
)
def test_impossible_resizing_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"--(short-side|quality)=.*: .*; "):
        Resizing(**options)


class Killed(BaseException):
    """Stands for a signal that no process outlives."""


@pytest.mark.parametrize("moment", range(9))
def test_a_store_killed_at_any_write_ends_the_same(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    monkeypatch.setattr(preparing, "_IMAGES_AT_ONCE", 3)
    monkeypatch.setattr(writing, "SHARD_BYTES", 1500)
    expected = contents(pack(images, tmp_path / "straight").path)
    write, moments = writing._write, iter(range(100))

    def torn(file: Any, content: bytes) -> None:
        if next(moments) == moment:
            write(file, content[: len(content) // 2])
            raise Killed
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write", torn)
        with pytest.raises(Killed):
            pack(images, tmp_path / "broken")
    with pytest.raises(DataError, match="is not finished; go on with the bin/dpsgd-pr"):
        Store(tmp_path / "broken")

    assert contents(pack(images, tmp_path / "broken").path) == expected


def test_what_was_looked_at_is_not_decoded_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_IMAGES_AT_ONCE", 4)
    kept, seen = preparing._kept, []

    def stopping(resizing: Resizing, image: Any) -> bytes | None:
        seen.append(image.place)
        if len(seen) == 9:
            raise Killed
        return kept(resizing, image)

    monkeypatch.setattr(preparing, "_kept", stopping)
    with pytest.raises(Killed):
        pack(images, tmp_path / "store")
    first = len(seen)
    pack(images, tmp_path / "store")

    assert seen[first:] == sorted(set(seen))[8:]


def test_going_on_with_other_images_or_options_is_refused(
    tmp_path: Path, images: Path
) -> None:
    with StoreWriter(tmp_path / "store", {"source": "other", "short_side": None}):
        pass
    with pytest.raises(DataError, match="was begun with other source; go on"):
        pack(images, tmp_path / "store")


def test_nothing_is_overwritten(tmp_path: Path, images: Path, store: Path) -> None:
    before = contents(store)
    with pytest.raises(DataError, match="is finished, and nothing is overwritten"):
        pack(images, store)
    with pytest.raises(DataError, match="is there already and is not a store"):
        pack(images, images)

    assert contents(store) == before


def test_two_processes_cannot_write_one_store(tmp_path: Path, images: Path) -> None:
    plan = {"source": open_source(str(images)).digest}
    plan |= {"short_side": None, "quality": None}
    with (
        StoreWriter(tmp_path / "store", plan),
        pytest.raises(DataError, match="is being written by another process"),
    ):
        pack(images, tmp_path / "store")


@pytest.fixture
def partly_corrupt(images: Path) -> Path:
    (images / "cat" / "003.jpg").write_bytes(b"not an image")
    whole = (images / "owl" / "005.jpg").read_bytes()
    (images / "owl" / "005.jpg").write_bytes(whole[: len(whole) // 2])
    deep = np.zeros((5, 5), np.uint16)
    Image.fromarray(deep).save(images / "owl" / "010.png")
    return images


def test_corrupt_images_are_listed_and_skipped_only_on_request(
    tmp_path: Path, partly_corrupt: Path
) -> None:
    with pytest.raises(DataError) as error:
        pack(partly_corrupt, tmp_path / "store")
    told = str(error.value).splitlines()

    assert len(told) == 4
    assert "index 1: SOURCE=" in told[0]
    assert "cat/003.jpg: cannot be decoded" in told[0]
    assert "index 8: " in told[1]
    assert "owl/005.jpg: cannot be decoded" in told[1]
    assert "index 10: " in told[2]
    assert "more than 8 bits" in told[2]
    assert "3 images do not decode; leave them out with --skip-corrupt" in told[3]
    store = pack(partly_corrupt, tmp_path / "store", skip_corrupt=True)
    assert len(store) == 8
    assert [one["index"] for one in store.manifest.skipped] == [1, 8, 10]
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_images_mended_meanwhile_are_not_skipped(
    tmp_path: Path, images: Path, partly_corrupt: Path
) -> None:
    with pytest.raises(DataError, match="3 images do not decode"):
        pack(images, tmp_path / "store")
    size = (images / "cat" / "003.jpg").stat().st_size
    content = b"P5 1 1 255 ".ljust(size, b"\0")  # as long as before, and an image
    (images / "cat" / "003.jpg").write_bytes(content)
    with pytest.raises(DataError, match="did not decode before, and does now; delete"):
        pack(images, tmp_path / "store", skip_corrupt=True)


def test_the_fingerprint_tells_stores_apart(tmp_path: Path, images: Path) -> None:
    one, same = pack(images, tmp_path / "one"), pack(images, tmp_path / "same")
    path = images / "cat" / "000.png"
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path)
    other = pack(images, tmp_path / "other")
    moved = Store(Path(shutil.move(one.path, tmp_path / "moved")))

    assert moved.fingerprint() == same.fingerprint() != other.fingerprint()
    assert zlib.crc32(moved.read(0)) != zlib.crc32(other.read(0))
