"""A place where no store can be is told in a line, and what is there stays."""

import errno
import os
from pathlib import Path

import pytest
from made_up_images import write_images
from unwilling_disks import full_disk, lock

from dpsgd.data import Resizing, Store, open_source, prepare
from dpsgd.data.store import writing
from dpsgd.errors import DataError

NO_STORE = "is there already and is not a store; name a folder that is new or empty"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 10)


def refused(images: Path, store: Path) -> str:
    """What is said of a store that is not made."""
    with pytest.raises(DataError) as caught:
        prepare(open_source(str(images)), store, resizing=Resizing())
    start, _, told = str(caught.value).partition(": ")
    assert start == f"STORE={store}"
    return told


def test_a_file_is_no_place_for_a_store(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")

    assert refused(images, file) == NO_STORE
    assert refused(images, file / "store") == (
        "cannot be written (Not a directory); give access to it, or name another folder"
    )
    assert file.read_text() == "mine"


def test_a_locked_place_is_told(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lock(patch, tmp_path / "locked", "mkdir")
        assert refused(images, tmp_path / "locked" / "store") == (
            "cannot be written (Permission denied); "
            "give access to it, or name another folder"
        )
    with monkeypatch.context() as patch:
        lock(patch, tmp_path / "locked", "exists")
        assert "(Permission denied)" in refused(images, tmp_path / "locked" / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"{}", b'{"format": 1}', None],
)
def test_a_plan_of_something_else_makes_no_store(
    tmp_path: Path, images: Path, content: bytes | None
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    plan = folder / "plan.json"
    plan.mkdir() if content is None else plan.write_bytes(content)

    assert refused(images, folder) == NO_STORE
    with pytest.raises(DataError, match="is not a store; make one of your images"):
        Store(folder)
    assert list(folder.iterdir()) == [plan]
    assert content is None or plan.read_bytes() == content


def test_a_plan_that_is_locked_is_told(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    lock(monkeypatch, folder / "plan.json", "read_bytes")

    assert "cannot be written (Permission denied)" in refused(images, folder)
    with pytest.raises(DataError, match=r"plan\.json cannot be read \(Permission den"):
        Store(folder)


@pytest.mark.parametrize("name", ["records.bin", "manifest.json"])
def test_a_store_goes_on_when_a_full_disk_has_room_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_whole = writing.write_whole

    def full(path: Path, content: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_whole", full)
        assert refused(images, tmp_path / "store") == (
            "cannot be written (No space left on device); "
            "make room, and go on with the same command"
        )
    assert prepare(open_source(str(images)), tmp_path / "store", resizing=Resizing())
    assert Store(tmp_path / "store").verify() == []


def test_a_plan_that_does_not_fit_is_no_obstacle(tmp_path: Path, images: Path) -> None:
    with full_disk(10):
        assert refused(images, tmp_path / "store") == (
            "cannot be written (File too large); "
            "make room, and go on with the same command"
        )
    assert list((tmp_path / "store").iterdir()) == []
    assert prepare(open_source(str(images)), tmp_path / "store", resizing=Resizing())
