import errno
import json
import os
import pickle
import resource
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_runs import command, write_config

from dpsgd.checkpoint import (
    Checkpoint,
    CheckpointStore,
    differences,
    read_tensors,
    write_atomically,
    write_tensors,
)
from dpsgd.errors import CheckpointError, UserError
from dpsgd.parallel import Ranks


def checkpoint(value: float) -> Checkpoint:
    return Checkpoint({"params/w": torch.full((3,), value)}, {"value": value})


def raising(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "folder", keep=2)
    facts = {"step": 3, "nested": {"list": [1, 2.5, None]}, "text": "a"}
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.tensor(7),
        "c": torch.arange(6.0).view(2, 3).T,
    }
    store.save(3, Checkpoint(tensors, facts))

    back = store.newest()
    assert back.facts == facts
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(leaf, back.tensors[name]) for name, leaf in tensors.items())


def test_only_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        store.save(step, checkpoint(step))
        if step in (8, 9):
            store.mark_best(step)

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "best.safetensors",
        "step-00000010.safetensors",
        "step-00000011.safetensors",
    ]
    assert store.newest().facts == {"value": 11}
    assert read_tensors(tmp_path / "best.safetensors")[1] == {"value": 9}


def test_the_best_is_copied_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", raising(errno.EPERM))
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, checkpoint(1.0))
    store.mark_best(1)
    store.save(2, checkpoint(2.0))

    best = tmp_path / "best.safetensors"
    assert read_tensors(best)[1] == {"value": 1.0}
    assert stat.S_IMODE(best.stat().st_mode) == 0o600


def test_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        CheckpointStore(tmp_path, keep=1).save(1, checkpoint(1.0))
    finally:
        os.umask(before)

    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "the disk is full; free"),
        (errno.EDQUOT, "the disk is full; free"),
        (errno.EIO, "cannot be written (Input/output error); give access"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "fdopen", "open"])
def test_a_failed_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, told: str
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, checkpoint(1.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raising(code))
        with pytest.raises(CheckpointError) as caught:
            store.save(2, checkpoint(2.0))

    path = tmp_path / "step-00000002.safetensors"
    assert str(caught.value).startswith(f"checkpoint={path}: {told}")
    assert str(caught.value).endswith("and go on with --resume")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert store.newest().facts == {"value": 1.0}


@pytest.mark.parametrize("in_shards", [False, True])
def test_without_a_checkpoint_no_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_shards: bool
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    save = partial(store.save_shards, ranks=Ranks()) if in_shards else store.save
    with pytest.raises(CheckpointError) as caught:
        save(0, checkpoint(1.0))

    assert str(caught.value).endswith("and start the run anew in another folder")


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, checkpoint(1.0))
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", raising(errno.EACCES))
        with pytest.raises(CheckpointError) as caught:
            store.newest()

    told = "cannot be read (Permission denied); give access to it"
    assert str(caught.value) == f"checkpoint={path}: {told}"
    assert store.newest().facts == {"value": 1.0}


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, checkpoint(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", raising(errno.EACCES))
        for use in (store.newest, lambda: store.save(2, checkpoint(2.0))):
            with pytest.raises(UserError, match=r"cannot be read \(Permission denied"):
                use()

    assert store.newest().facts == {"value": 1.0}


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced = []
    sync = os.fsync

    def watched(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        synced.append((kind, path.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, b"content")

    assert synced == [("file", False), ("folder", True)]
    assert path.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", keep=1)

    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory\)"):
        store.save(1, checkpoint(1.0))


def test_a_full_disk_ends_a_real_run_with_its_last_checkpoint_whole(
    tmp_path: Path,
) -> None:
    # Enough for the first checkpoint; the next also holds momenta.
    limit = 800_000
    config = write_config(tmp_path, {"optimizer.momentum": 0.9})
    done = command(
        "dpsgd-train",
        *(config, "--run-dir", tmp_path / "run"),
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
    )

    path = tmp_path / "run" / "checkpoints" / "step-00000001.safetensors"
    assert done.returncode == 2
    assert done.stderr.startswith(f"checkpoint={path}: the disk is full; free 9")
    assert len(done.stderr.splitlines()) == 1
    assert [one.name for one in path.parent.iterdir()] == ["step-00000000.safetensors"]


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (trap.touch, ())

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        CheckpointStore(tmp_path, keep=1).newest()
    torch.save({"w": Trap()}, path)
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        read_tensors(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert trap.exists()  # the trap works


def test_missing_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"missing or damaged.*delete it"):
        read_tensors(path)
    write_tensors(path, {"w": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_tensors(path)
    save_file({"w": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not written by dpsgd"):
        read_tensors(path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        CheckpointStore(tmp_path, keep=1).newest()


TENSORS = {"a": torch.tensor([1.5, 2.5]), "b": torch.ones(3, dtype=torch.bfloat16)}
FACTS = {"step": 40, "name": "\xe9", "nested": {"2": [1e-5, None, float("inf")]}}


def flip_a_bit(path: Path, after: bytes) -> None:
    """Damages the byte that follows on the first such bytes of a file."""
    content = bytearray(path.read_bytes())
    content[content.index(after) + len(after)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "after",
    [
        TENSORS["a"][:1].numpy().tobytes(),
        TENSORS["b"][:1].view(torch.uint8).numpy().tobytes(),
        rb"\"step\": ",
        rb"\"name\": \"\\u00e",
        rb"\"sha256\": \"",
        b'},"',  # the name of a tensor
    ],
)
def test_one_changed_bit_is_found(tmp_path: Path, after: bytes) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(40, Checkpoint(TENSORS, FACTS))
    assert store.newest().facts == FACTS

    path = tmp_path / "step-00000040.safetensors"
    flip_a_bit(path, after)
    told = rf"={path}: is missing or damaged \(the checksum of {path.name} differs\); "
    with pytest.raises(CheckpointError, match=told):
        store.newest()


def test_equal_contents_are_equal_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    contents = set()
    for _ in range(8):
        write_tensors(path, TENSORS, FACTS)
        contents.add(path.read_bytes())

    assert len(contents) == 1


def test_a_file_of_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"dpsgd": json.dumps(FACTS)})
    tensors, facts = read_tensors(path)

    assert facts == FACTS
    assert all(torch.equal(leaf, tensors[name]) for name, leaf in TENSORS.items())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The folder of step 2, beside that of step 1, of the same shape."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save_shards(step, checkpoint(step), Ranks())
    return tmp_path / "step-00000002.shards"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'\xff{"num_ranks": 1, "facts": {}}',
        b"{}",
        b"[]",
        b"null",
        b'{"num_ranks": 1, "fa',
        b'{"num_ranks": 1, "facts": 1}',
        b'{"num_ranks": "1", "facts": {}}',
        b'{"num_ranks": 0, "facts": {}}',
        b'{"num_ranks": 1000000000000, "facts": {}}',
    ],
)
def test_a_damaged_index_of_shards_is_refused(shards: Path, content: bytes) -> None:
    (shards / "index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"02\.shards: is missing or damaged \("):
        CheckpointStore(shards.parent, keep=2).newest()


def test_a_shard_of_another_save_or_rank_is_refused(shards: Path) -> None:
    name = "rank-00000.safetensors"
    own = (shards / name).read_bytes()
    store = CheckpointStore(shards.parent, keep=2)
    store.save_shards(2, checkpoint(3), Ranks())
    assert store.newest().tensors["params/w"].tolist() == [3.0] * 3

    told = rf"damaged \({name} is of another save or rank\)"
    for other in (own, (shards.parent / "step-00000001.shards" / name).read_bytes()):
        (shards / name).write_bytes(other)
        with pytest.raises(CheckpointError, match=told):
            store.newest()
    save = json.loads((shards / "index.json").read_text())["save"]
    write_tensors(shards / name, {"w": torch.ones(1)}, {"rank": 1, "save": save})
    with pytest.raises(CheckpointError, match=told):
        store.newest()


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("rank-00000.safetensors", torch.full((2,), 2).numpy().tobytes()),
        ("rank-00000.safetensors", rb"\"save\": \""),
        ("index.json", b'"value": '),
        ("index.json", b'"sha256": "'),
    ],
)
def test_one_changed_bit_of_shards_is_found(
    shards: Path, name: str, after: bytes
) -> None:
    flip_a_bit(shards / name, after)
    told = rf"02\.shards: is missing or damaged \(the checksum of {name} differs\)"
    with pytest.raises(CheckpointError, match=told):
        CheckpointStore(shards.parent, keep=2).newest()


def test_shards_of_before_words_and_checksums_are_read(shards: Path) -> None:
    store = CheckpointStore(shards.parent, keep=2)
    tensors, facts = dict(store.newest().tensors), store.newest().facts
    old = {"dpsgd": json.dumps({"rank": 0})}
    save_file(tensors, shards / "rank-00000.safetensors", metadata=old)
    index = {"num_ranks": 1, "facts": facts}
    (shards / "index.json").write_text(json.dumps(index))

    assert store.newest().facts == facts
    assert store.newest().tensors["params/w"].tolist() == [2.0] * 3


def test_differences_name_every_value() -> None:
    saved = {"a": {"x": 1, "y": [1, 2]}, "gone": "text", "same": None}
    present = {"a": {"x": 2.5, "y": [1, 3]}, "new": True, "same": None}

    assert differences(saved, present) == [
        "a.x=2.5: the checkpoint has 1",
        "a.y=[1, 3]: the checkpoint has [1, 2]",
        "gone=null: the checkpoint has text",
        "new=true: the checkpoint has null",
    ]
    assert differences(saved, saved) == []
    assert differences({"x": 1}, {"x": 2}, "p.") == ["p.x=2: the checkpoint has 1"]
