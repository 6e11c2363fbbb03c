from pathlib import Path

import pytest
from made_up_images import damage, make_store, write_images
from small_runs import command
from unwilling_disks import lock

from dpsgd.cli import prepare
from dpsgd.data import Store


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and all that the command printed."""
    code = prepare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_store_is_packed_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, store = write_images(tmp_path / "images", 7), tmp_path / "store"

    summary = f"{store}: 7 images, 3 classes, 0.0 MiB\n"
    assert told(capsys, images, store) == (0, summary)
    assert told(capsys, "--verify", store) == (0, summary)
    damage(store / "shard-00000.bin", at=0)
    code, text = told(capsys, "--verify", store)
    assert code == 2
    assert f"--verify={store}: images with a wrong checksum: 0; copy the" in text


def test_corrupt_images_are_told_and_skipped_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, store = write_images(tmp_path / "images", 7), tmp_path / "store"
    (images / "dog" / "001.jpg").write_bytes(b"")
    code, text = told(capsys, images, store)
    assert code == 2
    assert "index 3: SOURCE=" in text
    assert "1 images do not decode; leave them out with --skip-corrupt" in text

    code, text = told(capsys, images, store, "--skip-corrupt")
    assert code == 0
    assert "skipped: 1 images that do not decode" in text
    assert len(Store(store)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE and STORE are required, or --verify STORE alone"),
        (["images"], "SOURCE and STORE are required"),
        (["images", "store", "--verify", "store"], "--verify STORE alone"),
        (["images", "store", "--short-side", "9"], "--quality=null: goes with"),
        (["nowhere", "store"], "SOURCE=nowhere: no such file"),
        (["images", "images/store"], "STORE=images/store: lies in SOURCE"),
        (["--verify", "nowhere"], "--verify=nowhere: is not a store"),
    ],
)
def test_faults_are_told_with_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, text = told(capsys, *arguments)

    assert code == 2
    assert message in text


def test_a_shard_that_is_locked_is_not_called_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", 7).path
    lock(monkeypatch, store / "shard-00000.bin", "open")

    assert told(capsys, "--verify", store) == (
        2,
        f"--verify={store}: shard-00000.bin cannot be read (Permission denied); "
        "give access to it, or copy the store again\n",
    )


def test_the_command_of_bin_runs() -> None:
    done = command("dpsgd-prepare", "--help")

    assert done.returncode == 0
    assert "--short-side N" in done.stdout
