"""`dpsgd-data leave-out` acts on the report of the very set it is given, or refuses."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_up_images import write_images
from small_runs import write_parquet

from dpsgd.cli import data
from dpsgd.data import open_source

REMEDY = "compare the sets again with bin/dpsgd-data overlap"


@pytest.fixture
def public(tmp_path: Path) -> str:
    """Two files of 7 and 5 images: rows 0 to 11, labels 0 1 2 from row 0 and row 7."""
    (tmp_path / "public").mkdir()
    for name, count in (("a", 7), ("b", 5)):
        path = tmp_path / "public" / f"{name}.parquet"
        write_parquet(path, owner=["x"] * count)
    return str(tmp_path / "public" / "*.parquet")


def report_of(public: str) -> dict[str, Any]:
    """A report with pairs 1 to 3 above the threshold, and 4 and 5 below it."""
    rows = {1: 8, 2: 0, 3: 3, 4: 11, 5: 2}
    pairs = [
        {"pair": number, "public_row": row, "public": f"place {row}", "private": "?"}
        for number, row in rows.items()
    ]
    source = open_source(public)
    return {
        "public": len(source),
        "public_sha256": source.content_sha256(),
        "pairs": pairs[:3],
        "below": pairs[3:],
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    path = folder / "overlap.json"
    path.write_text(json.dumps(report))
    return path


@pytest.fixture
def report(tmp_path: Path, public: str) -> Path:
    return write_report(tmp_path, report_of(public))


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and all that the command printed."""
    code = data.main(["leave-out", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that refuses."""
    code, text = told(capsys, *arguments)
    (line,) = text.splitlines()
    assert code == 2
    return line


def table_of(text: str) -> dict[str, str]:
    """Names and values that were printed."""
    lines = [line.split("│")[1:3] for line in text.splitlines() if "│" in line]
    return {name.strip(): value.strip() for name, value in lines}


def contents(path: str | Path) -> list[bytes]:
    return [image.content() for image in open_source(str(path)).encoded(0)]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], [0, 3, 8]),
        (["--keep", "1"], [0, 3]),
        (["--also", "5", "4"], [0, 2, 3, 8, 11]),
        (["--keep", "1", "3", "--also", "4", "--keep", "3"], [0, 11]),
    ],
)
def test_the_rows_of_the_pairs_are_left_out_and_told(
    options: list[str],
    rows: list[int],
    public: str,
    report: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, images, labels = tmp_path / "out", contents(public), open_source(public).labels
    code, text = told(capsys, public, report, "--out", out, *options)

    assert code == 0
    assert contents(out) == [images[row] for row in range(12) if row not in rows]
    note = json.loads((out / "left_out.json").read_text())
    names = ["cat", "dog", "owl"]
    assert note["left_out"] == [
        {
            "row": row,
            "public": f"place {row}",
            "label": int(labels[row]),
            "class": names[labels[row]],
        }
        for row in rows
    ]
    assert note["num_examples"] == 12 - len(rows)
    assert (note["public"], note["report"]) == (public, str(report))
    digest = hashlib.sha256(report.read_bytes()).hexdigest()
    assert note["report_sha256"] == digest
    table = table_of(text)
    assert table.pop("images") == f"{len(rows)} of 12"
    assert table.pop("data.num_examples") == str(12 - len(rows))
    assert table == {
        f"class {names[label]}, label {label}": str(count)
        for label in range(3)
        if (count := sum(labels[row] == label for row in rows))
    }


def test_class_folders_are_written_as_class_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = write_images(tmp_path / "public", 12)
    report = write_report(tmp_path, report_of(str(public)))
    out = tmp_path / "out"

    assert told(capsys, public, report, "--out", out)[0] == 0
    assert contents(out) == [
        content for row, content in enumerate(contents(public)) if row not in (0, 3, 8)
    ]
    assert {path.name for path in out.iterdir()} == {
        *("cat", "dog", "owl"),
        "left_out.json",
    }


def test_many_classes_are_counted_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpsgd.cli.data.leave_out._MAX_TOLD", 1)
    public = write_parquet(tmp_path / "a.parquet", owner=["x"] * 12)
    report = write_report(tmp_path, report_of(public))
    # Left out are rows 3, 8 and 11: a cat and two owls.
    options = ("--keep", "2", "--also", "4")
    _, text = told(capsys, public, report, "--out", tmp_path / "out", *options)

    assert table_of(text) == {
        "images": "3 of 12",
        "class owl, label 2": "2",
        "1 other classes": "1",
        "data.num_examples": "9",
    }


def test_where_nothing_is_to_be_left_out_nothing_is_written(
    public: str, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"nothing to leave out, and nothing written: use {public} as it is\n"
    arguments = (public, report, "--out", tmp_path / "out")
    assert told(capsys, *arguments, "--keep", "1", "2", "3") == (0, line)
    write_report(tmp_path, {**report_of(public), "pairs": [], "below": []})
    assert told(capsys, *arguments) == (0, line)

    assert not (tmp_path / "out").exists()
    line = refused(capsys, *arguments, "--keep", "1")
    assert line.startswith("--keep=1: must be the number of a pair above the threshold")
    assert line.endswith("overlap.json has none")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--keep", "4"], "--keep=4: must be the number of a pair above the threshold"),
        (["--keep", "0"], "--keep=0: must be the number of a pair above the threshold"),
        (["--also", "3"], "--also=3: must be the number of a pair below the threshold"),
        (["--also", "6"], "--also=6: must be the number of a pair below the threshold"),
    ],
)
def test_numbers_of_no_pair_are_refused(
    options: list[str],
    line: str,
    public: str,
    report: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = "1 to 3" if options[0] == "--keep" else "4 to 5"
    arguments = (public, report, "--out", tmp_path / "out", *options)

    assert refused(capsys, *arguments) == f"{line}; {report} has {known}"
    assert not (tmp_path / "out").exists()


def test_a_report_of_another_set_is_refused(
    public: str, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    one = str(tmp_path / "public" / "a.parquet")
    assert refused(capsys, one, report, "--out", out) == (
        f"OVERLAP.json={report}: compared 12 images, and PUBLIC has 7; "
        "name the set that was compared"
    )
    # As many images, in another order.
    (tmp_path / "public" / "a.parquet").rename(tmp_path / "public" / "c.parquet")
    assert refused(capsys, public, report, "--out", out) == (
        f"OVERLAP.json={report}: compared other images than those of PUBLIC, "
        "or in another order; name the set that was compared"
    )
    assert not out.exists()

    # Names alone change nothing.
    (tmp_path / "public" / "c.parquet").rename(tmp_path / "public" / "aa.parquet")
    assert told(capsys, public, report, "--out", out)[0] == 0


def test_a_report_that_is_none_or_torn_is_refused(
    public: str, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = report_of(public)
    text = json.dumps(whole).encode()
    told_of = f"OVERLAP.json={report}: "
    torn = f"{told_of}is not a whole report of an overlap ("

    def line() -> str:
        return refused(capsys, public, report, "--out", tmp_path / "out")

    for content in (b"", text[:-1], text[:40], b"\xff\xfe", b"7", b"[]", b"null"):
        report.write_bytes(content)
        assert line().startswith(torn), content
        assert line().endswith(f"; {REMEDY}")
    for key in ("public", "public_sha256", "pairs", "below"):
        write_report(tmp_path, {name: whole[name] for name in whole if name != key})
        assert line() == f"{told_of}is an older report, or none: it lacks '{key}'; " + (
            REMEDY
        )
    pair = whole["pairs"][0]
    for wrong in ({"public_row": "x"}, {"public_row": 9}, {"pair": 9}):
        write_report(tmp_path, {**whole, "pairs": [pair, {**pair, **wrong}]})
        assert line().startswith(torn), wrong
    for pairs in (7, [7], ["x"]):
        write_report(tmp_path, {**whole, "pairs": pairs})
        assert line().startswith(torn), pairs
    report.unlink()
    assert line().startswith(f"{told_of}cannot be read (No such file or directory); na")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [-1, 12])
def test_rows_beyond_the_set_are_refused(
    row: int,
    public: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = report_of(public)
    for key, pair in (("pairs", 1), ("below", 4)):
        wrong = {**whole[key][0], "public_row": row}
        report = write_report(tmp_path, {**whole, key: [wrong]})
        assert refused(capsys, public, report, "--out", tmp_path / "out") == (
            f"OVERLAP.json={report}: names row {row} in pair {pair}, "
            f"and PUBLIC has rows 0 to 11; {REMEDY}"
        )


def test_what_is_missing_or_there_already_is_told(
    public: str, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "absent.parquet", report, "--out", tmp_path / "out")
    assert line.startswith("PUBLIC=absent.parquet: no such file")
    line = refused(capsys, public, report, "--out", tmp_path / "public")
    assert line.startswith(f"--out={tmp_path / 'public'}: is there already, and noth")
    line = refused(capsys, public, report)
    assert "the following arguments are required: --out" in line


def test_the_help_says_what_a_missing_image_reveals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        data.main(["leave-out", "--help"])
    text = " ".join(capsys.readouterr().out.split())

    assert "What is left out depends on the private set" in text
    assert "whoever sees which public images are missing learns that it holds" in text
