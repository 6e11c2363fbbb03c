from pathlib import Path

import pytest
from unwilling_disks import refused

from dpsgd.errors import ConfigError, UserError
from dpsgd.report import OwnFiles

FILES = {"report.html": b"one", "figures/a.png": b"two"}


def own_files(folder: Path) -> OwnFiles:
    return OwnFiles(folder, option="--output")


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_report_may_be_written_again(tmp_path: Path) -> None:
    own_files(tmp_path / "new").replace(FILES)
    again = {name: content * 2 for name, content in FILES.items()}
    own_files(tmp_path / "new").replace(again)
    own_files(tmp_path / "new").replace(again)

    assert content_of(tmp_path / "new") == again


def test_what_a_user_made_or_changed_is_left_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    own_files(tmp_path).replace(FILES)
    (tmp_path / "figures" / "a.png").write_bytes(b"annotated")

    with pytest.raises(ConfigError, match=r"a\.png: was not written by a report, or"):
        own_files(tmp_path).replace({"report.html": b"new", "figures/a.png": b"new"})
    assert content_of(tmp_path) == {
        "report.html": b"one",
        "figures/a.png": b"annotated",
    }


def test_a_file_that_was_there_before_is_left(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(b"mine")

    with pytest.raises(ConfigError, match=r"move it away, or .* --output"):
        own_files(tmp_path).replace(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()

    with pytest.raises(ConfigError, match=r"report\.html: was not written by"):
        own_files(tmp_path).replace(FILES)


def test_a_report_that_was_killed_half_way_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_files(tmp_path).replace(FILES)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == "a.png":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    new = {name: b"new" for name in FILES}
    with pytest.raises(KeyboardInterrupt):
        own_files(tmp_path).replace(new)
    monkeypatch.undo()
    assert content_of(tmp_path) == {"report.html": b"new", "figures/a.png": b"two"}

    own_files(tmp_path).replace(new)
    assert content_of(tmp_path) == new


def test_without_its_list_nothing_is_known_to_be_ours(tmp_path: Path) -> None:
    own_files(tmp_path).replace(FILES)
    (tmp_path / ".dpsgd-report.json").write_text("[")

    with pytest.raises(ConfigError, match=r"report\.html: was not written by"):
        own_files(tmp_path).replace(FILES)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"cannot be written \(File exists\)"):
        own_files(tmp_path / "file").replace(FILES)


def test_another_folder_is_named_with_the_option_that_the_command_has(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "report.html").write_text("mine")

    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match=r", or name .* folder with --sweep-dir$"):
            OwnFiles(folder, option="--sweep-dir").replace(FILES)


def test_what_is_there_and_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_files(tmp_path).replace(FILES)
    monkeypatch.setattr(Path, "read_bytes", refused)

    with pytest.raises(UserError, match=r"^report=.*: cannot be read \(Permission de"):
        own_files(tmp_path).replace(FILES)
