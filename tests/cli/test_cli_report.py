import shutil
from pathlib import Path

import pytest
from made_up_runs import result, write_run
from small_runs import command
from unwilling_disks import lock

from dpsgd.cli import report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of few figures, so that its report is written fast."""
    return write_run(tmp_path / "run", lines=[], report=result())


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert report.main([str(one) for one in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_a_run_gets_its_report_into_its_own_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a [bold] run", report=result())
    before = {path: path.read_bytes() for path in run.iterdir()}
    done = command("dpsgd-report", run)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"report: {run}/report.html\n"
    assert "(2.9999, 1e-05)-differential privacy" in (run / "report.html").read_text()
    assert len(list((run / "figures").glob("*.png"))) == 5
    assert {path: path.read_bytes() for path in before} == before


def test_a_report_is_written_again_but_never_over_what_a_user_made(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(run)]) == 0
    assert report.main([str(run)]) == 0
    (run / "report.html").write_text("my notes")

    assert "was not written by a report, or has been changed" in told(capsys, run)
    assert (run / "report.html").read_text() == "my notes"


def test_several_runs_get_a_folder_of_their_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    monkeypatch.chdir(tmp_path)

    assert report.main([str(run), str(other)]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("report-20")
    assert "Comparison of 2 runs" in (folder / "report.html").read_text()
    assert report.main([str(run), str(other), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (run / "report.html").exists()


def test_no_report_goes_into_the_folder_of_another_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert report.main([str(other)]) == 0
    left = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    refused = f"--output={other}: is the folder of a run, where only the report of that"

    for runs in ([run], [run, other], [other, run]):
        assert told(capsys, *runs, "--output", other).startswith(refused)
    now = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert now == left
    assert report.main([str(other), "--output", f"{run}/../other"]) == 0  # its own


def test_what_cannot_be_read_is_told(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = tmp_path / "closed"
    lock(monkeypatch, closed, "stat")
    told_why = "cannot be read (Permission denied); give access to it"

    assert told(capsys, closed) == f"run_dir={closed}: {told_why}"
    assert told(capsys, run, "--output", closed) == f"--output={closed}: {told_why}"


def test_faults_are_told_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no run" in told(capsys, tmp_path)
    assert "is given twice" in told(capsys, run, run)
    assert "required: RUN_DIR" in told(capsys)
    assert "cannot be written" in told(capsys, run, "--output", run / "config.yaml")
