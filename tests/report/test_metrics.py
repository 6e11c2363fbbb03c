from pathlib import Path

import pytest

from dpsgd.errors import UserError
from dpsgd.report import MetricsWriter, last_evaluated_step, read_metrics, to_json


def test_records_are_appended_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": float("nan")})
    writer.write({"step": 2, "values": (1.5, float("inf"))})

    assert path.read_text() == (
        '{"step": 1, "loss": null}\n{"step": 2, "values": [1.5, null]}\n'
    )
    assert read_metrics(path) == [
        {"step": 1, "loss": None},
        {"step": 2, "values": [1.5, None]},
    ]


def written_to_step_3(path: Path) -> None:
    """Writes unprotected values and an evaluation of each of three steps."""
    writer = MetricsWriter(path)
    for step in (1, 2, 3):
        writer.write({"step": step, "unprotected": {}})
        writer.write({"step": step, "test_accuracy": 0.5})


def test_a_resumed_run_drops_no_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written_to_step_3(path)
    MetricsWriter(path, from_step=2)

    # Step 3 was shown, whether or not it will be shown again.
    assert read_metrics(path) == [
        {"step": 1, "unprotected": {}},
        {"step": 1, "test_accuracy": 0.5},
        {"step": 2, "unprotected": {}},
        {"step": 2, "test_accuracy": 0.5},
        {"step": 3, "test_accuracy": 0.5},
    ]
    assert last_evaluated_step(path) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_repeated_takes_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written_to_step_3(path)
    writer = MetricsWriter(path, from_step=1)
    writer.write({"step": 1, "test_accuracy": 0.7})
    writer.write({"step": 2, "unprotected": {}})
    writer.write({"step": 3, "unprotected": {}})
    writer.write({"step": 3, "test_accuracy": 0.9})
    writer.write({"step": 4, "unprotected": {}})

    assert read_metrics(path) == [
        {"step": 1, "unprotected": {}},
        {"step": 1, "test_accuracy": 0.7},
        {"step": 2, "unprotected": {}},
        {"step": 2, "test_accuracy": 0.5},
        {"step": 3, "unprotected": {}},
        {"step": 3, "test_accuracy": 0.9},
        {"step": 4, "unprotected": {}},
    ]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsWriter(path, from_step=9).write({"step": 9})

    assert read_metrics(path) == [{"step": 1}, {"step": 9}]


def test_a_crash_while_dropping_lines_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        MetricsWriter(path, from_step=9)
    assert read_metrics(path) == [{"step": 1}]


def test_kept_lines_are_on_the_disk_before_they_replace_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    done, replace = [], Path.replace
    monkeypatch.setattr("os.fsync", lambda _: done.append("on the disk"))
    monkeypatch.setattr(
        Path, "replace", lambda *paths: done.append("replaced") or replace(*paths)
    )
    MetricsWriter(path, from_step=9)

    assert done == ["on the disk", "replaced"]
    assert read_metrics(path) == [{"step": 1}]


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for old in (path, tmp_path / "metrics.jsonl.tmp"):  # as they once were made
        old.touch()
        old.chmod(0o644)
    writer = MetricsWriter(path)

    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    writer.write({"step": 1})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_is_a_users_fault(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(UserError, match=r"metrics=.*No such file.*go on with --resume"):
        MetricsWriter(path)
    path.parent.mkdir()
    writer = MetricsWriter(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics=.*cannot be written \(Is a dir"):
        writer.write({"step": 1})


def test_a_file_that_cannot_be_read_is_a_users_fault(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()

    told = r"metrics=.*: cannot be read \(Is a directory\); give access to it$"
    with pytest.raises(UserError, match=told):
        read_metrics(path)


def test_a_file_that_is_no_text_is_a_users_fault(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe')

    with pytest.raises(UserError, match=r"metrics=.*: cannot be read \(not a text"):
        read_metrics(path)
    assert path.read_bytes() == b'{"step": 1}\n\xff\xfe'


def test_json_is_strict() -> None:
    assert to_json({"a": [float("-inf"), {"b": float("nan")}, 1]}) == (
        '{"a": [null, {"b": null}, 1]}'
    )
