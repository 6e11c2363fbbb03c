"""What the example that writes class folders says of what cannot be."""

import runpy
from pathlib import Path

import pytest
from small_runs import ROOT, write_parquet
from unwilling_disks import full_disk


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Seven images of three classes."""
    return write_parquet(tmp_path / "a.parquet", owner=["x"] * 7)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    script = str(ROOT / "examples" / "image_folder.py")
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(script, run_name="__main__")


def refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str | Path,
) -> str:
    """The line that refuses, after the usage."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    return (
        capsys.readouterr()
        .err.splitlines()[-1]
        .removeprefix("image_folder.py: error: ")
    )


@pytest.mark.parametrize("count", ["-3", "0", "4", "100000"])
def test_only_as_many_classes_as_there_are_can_be_written(
    source: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    count: str,
) -> None:
    told = refused(capsys, monkeypatch, source, tmp_path / "out", f"--classes={count}")
    assert told == (
        f"--classes={count}: must be in [1, 3], the number of classes; "
        "change it or leave it out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(("options", "classes"), [([], 3), (["--classes=3"], 3)])
def test_all_classes_can_be_written(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    classes: int,
) -> None:
    run(monkeypatch, source, tmp_path / "out", *options)

    assert len(list((tmp_path / "out").iterdir())) == classes
    assert len(list((tmp_path / "out").glob("*/*"))) == 7


def test_a_place_that_cannot_be_written_is_told_in_a_line(
    source: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, file = Path(source).read_bytes(), Path(source)
    remedy = "or name a folder elsewhere; nothing was left"

    assert refused(capsys, monkeypatch, source, file / "out") == (
        f"folder={file / 'out'}: cannot be written (Not a directory); "
        f"give access to it, {remedy}"
    )
    with full_disk(30):
        told = refused(capsys, monkeypatch, source, tmp_path / "out")
    assert told == (f"folder={tmp_path / 'out'}: the disk is full; make room, {remedy}")
    assert "is there already" in refused(capsys, monkeypatch, source, file)
    assert Path(source).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
