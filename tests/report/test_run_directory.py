import json
from datetime import datetime
from pathlib import Path

import pytest
from unwilling_disks import refused

from dpsgd.errors import ConfigError, UserError
from dpsgd.report import RunDirectory, default_run_directory, environment, to_json


def test_a_folder_that_holds_anything_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match=r"nothing is overwritten; .* --resume "):
        RunDirectory(tmp_path).create({})
    with pytest.raises(ConfigError, match=r"; name another folder$"):
        RunDirectory(tmp_path).create({}, can_resume=False)
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        RunDirectory(tmp_path / "notes.txt").create({})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_or_absent_folder_is_taken(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        RunDirectory(folder).create({"section": {"key": [1, None]}})
        assert RunDirectory(folder).config.read_text() == (
            "section:\n  key:\n  - 1\n  - null\n"
        )
        RunDirectory(folder).require()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"cannot be made \(Not a directory\)"):
        RunDirectory(tmp_path / "file" / "run").create({})


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir=.*holds no run"):
        RunDirectory(tmp_path).require()


@pytest.mark.parametrize("name", ["scores.json", "report.json"])
def test_a_folder_with_an_audit_is_told_by_either_file(
    tmp_path: Path, name: str
) -> None:
    RunDirectory(tmp_path).create({})
    (tmp_path / "report.json").write_text('{"epsilon": 1.0}')
    RunDirectory(tmp_path).require()

    (tmp_path / name).write_text('{"canaries": {}}')
    with pytest.raises(ConfigError, match=r"run_dir=.*: holds an audit, .*; name"):
        RunDirectory(tmp_path).require()


def test_a_folder_that_cannot_be_entered_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDirectory(tmp_path).create({})
    told = r"^run_dir=.*: cannot be read \(Permission denied\); give access to it$"
    monkeypatch.setattr("os.open", refused)
    with pytest.raises(UserError, match=told), RunDirectory(tmp_path).locked():
        raise AssertionError("locked")
    with pytest.raises(UserError, match=told):
        RunDirectory(tmp_path).is_locked()

    RunDirectory(tmp_path).checkpoints.mkdir()
    monkeypatch.setattr("os.listdir", refused)
    with pytest.raises(UserError, match=told):
        RunDirectory(tmp_path).newest_checkpoint()

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(UserError, match=told):
        RunDirectory(tmp_path).require()
    with pytest.raises(UserError, match=told.replace("run_dir", "--run-dir")):
        RunDirectory(tmp_path).require_absent()


def test_who_trains_in_a_folder_is_seen_from_outside(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)

    assert not RunDirectory(tmp_path / "absent").is_locked()
    assert not directory.is_locked()
    with directory.locked():
        assert directory.is_locked()
        with (
            pytest.raises(ConfigError, match="another process is training"),
            directory.locked(),
        ):
            raise AssertionError("locked twice")
    assert not directory.is_locked()


def test_default_names_tell_config_and_time() -> None:
    path = default_run_directory(
        Path("configs/a.b.yaml"), datetime(2026, 1, 2, 3, 4, 5)
    )

    assert path == Path("runs/a.b-20260102-030405")


def test_the_environment_traces_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(to_json(environment()))

    assert facts["versions"]["torch"]
    assert facts["versions"]["prv-accountant"]
    assert facts["python"].startswith("3.")
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None
