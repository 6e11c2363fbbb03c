import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import ROOT, write_config
from sweep_runs import leave_run

from dpsgd.cli import sweep
from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepPlan, SweepRun


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """A sweep of three seeds."""
    write_config(tmp_path, {"train.seed": None, "train.num_steps": 1})
    path = tmp_path / "seeds.yaml"
    content = {"config": "small.yaml", "grid": {"train.seed": [0, 1, 2]}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Leaves a finished run in place of each training, the second of which fails."""
    indices: list[int] = []

    def train(folder: SweepFolder, plan: SweepPlan, run: SweepRun) -> list[str]:
        indices.append(run.index)
        if run.index == 1:
            return ["sh", "-c", "echo 'runtime.device=x: rule; remedy' >&2; exit 2"]
        leave_run(folder, run)
        return ["true"]

    monkeypatch.setattr("dpsgd.cli.sweep.train_command", train)
    monkeypatch.setattr("dpsgd.cli.sweep._num_gpus", lambda: 0)
    # Curves are drawn, slowly, in the tests of reports.
    monkeypatch.setattr("dpsgd.sweep.page._curves", lambda records: [])
    return indices


def statuses(folder: Path) -> list[Any]:
    facts = json.loads((folder / "results.json").read_text())
    return [row["status"] for row in facts["runs"]]


def run(*arguments: str | Path) -> int:
    return sweep.main([str(argument) for argument in arguments])


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_sweep_makes_its_runs_and_their_tables(
    sweep_file: Path,
    started: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(sweep_file.parent)

    assert run(sweep_file) == 1  # one failed
    shown = capsys.readouterr().out
    folder = sweep_file.parent / "runs" / "seeds"
    assert started == [0, 1, 2]
    assert "which the epsilon of the run that is chosen does not cover" in " ".join(
        shown.split()
    )
    assert "failed: seed=1: runtime.device=x: rule; remedy" in shown
    assert "--retry-failed tries them again" in shown
    assert "3 runs in runs/seeds, one at a time on cpu" in shown
    assert f"report: {Path('runs/seeds/report.html')}" in shown
    assert statuses(folder) == ["finished", "failed", "finished"]
    for name in ("results.json", "results.md", "summary.csv", "figures/sweep.png"):
        assert (folder / name).is_file()


def test_a_sweep_goes_on_where_it_was_and_tries_failures_only_when_asked(
    sweep_file: Path, started: list[int], tmp_path: Path
) -> None:
    arguments = (sweep_file, "--sweep-dir", tmp_path / "sweep")

    assert run(*arguments) == 1
    assert run(*arguments) == 1
    assert started == [0, 1, 2]
    assert run(*arguments, "--retry-failed") == 1
    assert started == [0, 1, 2, 1]


@pytest.mark.parametrize("code", [130, 143])
def test_runs_that_are_stopped_from_outside_are_left_to_the_same_command(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    arguments = (sweep_file, "--sweep-dir", tmp_path / "sweep")
    stopped = ["sh", "-c", f"exit {code}"]
    with monkeypatch.context() as patch:
        patch.setattr("dpsgd.cli.sweep.train_command", lambda *_: stopped)
        assert run(*arguments) == 1
    assert "3 runs are not finished; the same command goes on" in (
        capsys.readouterr().out
    )
    assert run(*arguments, "--summary") == 0
    assert statuses(tmp_path / "sweep") == ["waiting"] * 3

    assert run(*arguments) == 1
    assert started == [0, 1, 2]
    assert "not finished" not in capsys.readouterr().out  # but one failed


def test_one_run_can_be_made_alone_and_the_tables_afterwards(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (sweep_file, "--sweep-dir", tmp_path / "sweep")

    assert run(*arguments, "--only", "2") == 0
    assert run(*arguments, "--only", "1") == 1
    assert started == [2, 1]
    assert not (tmp_path / "sweep" / "results.csv").exists()
    assert run(*arguments, "--summary") == 1
    assert started == [2, 1]
    assert statuses(tmp_path / "sweep") == ["waiting", "failed", "finished"]
    assert "--only=3: the sweep has the runs 0 to 2" in told(
        capsys, *arguments, "--only", "3"
    )


@pytest.mark.parametrize("width", [80, 58])
def test_words_of_headings_are_whole_where_there_is_room_and_no_column_is_cut_off(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    grid = {"privacy.expected_batch_size": [1024], "optimizer.learning_rate": [2]}
    content = {"config": "small.yaml", "grid": grid}
    sweep_file.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("COLUMNS", str(width))

    assert run(sweep_file, "--sweep-dir", tmp_path / "sweep") == 0
    lines = capsys.readouterr().out.splitlines()
    heading = " ".join(line for line in lines if line.startswith("┃"))
    words = {"expected_", "batch_size", "learning_", "rate", "multiplier", "epsilon"}
    assert (words <= set(heading.replace("┃", " ").split())) is (width == 80)
    (row,) = [line for line in lines if line.startswith("│") and "1024" in line]
    assert row.endswith("2.9999 │")
    assert len(row) <= width


def test_a_plan_starts_and_writes_nothing(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.iterdir())

    assert run(sweep_file, "--plan", "--sweep-dir", tmp_path / "sweep") == 0
    assert "seed=2" in capsys.readouterr().out
    assert started == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_script_for_a_cluster_is_printed(
    sweep_file: Path, started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep_file.parent / "sweep"

    assert run(sweep_file, "--slurm", "--sweep-dir", folder) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "#SBATCH --array=0-2\n" in script
    assert started == []
    assert (folder / "logs").is_dir()  # where the scheduler writes


def test_faults_are_told_in_one_line(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")

    assert "--jobs=0: must be above 0" in told(
        capsys, sweep_file, "--jobs", "0", "--sweep-dir", tmp_path / "sweep"
    )
    assert "holds other files than a sweep's" in told(
        capsys, sweep_file, "--sweep-dir", tmp_path / "other"
    )
    assert "sweep=" in told(capsys, tmp_path / "absent.yaml")
    assert started == []


def test_tables_are_written_only_where_the_sweep_has_been(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, mistyped = tmp_path / "sweep", tmp_path / "swep"
    assert run(sweep_file, "--sweep-dir", folder) == 1
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = tmp_path / "other.yaml"
    content = {"config": "small.yaml", "grid": {"train.seed": [3, 4]}}
    other.write_text(yaml.safe_dump(content))

    line = told(capsys, sweep_file, "--summary", "--sweep-dir", mistyped)
    assert line.startswith(f"--sweep-dir={mistyped}: holds no sweep (sweep.json is")
    assert not mistyped.exists()
    line = told(capsys, other, "--summary", "--sweep-dir", folder)
    assert line.startswith(f"--sweep-dir={folder}: holds runs of other settings only")
    now = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert now == left

    content["grid"] = {"train.seed": [2, 3]}
    other.write_text(yaml.safe_dump(content))
    assert run(other, "--summary", "--sweep-dir", folder) == 0
    assert statuses(folder) == ["finished", "waiting"]


def test_tables_that_a_user_has_changed_are_left(
    sweep_file: Path,
    started: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (sweep_file, "--sweep-dir", tmp_path / "sweep")
    assert run(*arguments) == 1
    (tmp_path / "sweep" / "results.md").write_text("annotated")

    line = told(capsys, *arguments, "--summary")
    assert "results.md: was not written by a report, or has been changed" in line
    assert line.endswith("move it away, or name another folder with --sweep-dir")
    assert (tmp_path / "sweep" / "results.md").read_text() == "annotated"


@pytest.mark.slow
def test_a_sweep_that_is_stopped_saves_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many steps of a checkpoint each take seconds, in which the signal arrives.
    long = {"train.seed": None, "train.num_steps": 100, "eval.every": 100}
    small = {"model.name": "convnet", "model.depth": 1, "model.groups": 4}
    write_config(tmp_path, {**long, **small, "privacy.accountant": "rdp"})
    path = tmp_path / "rates.yaml"
    grid = {"optimizer.learning_rate": [0.5, 1]}
    path.write_text(yaml.safe_dump({"config": "small.yaml", "grid": grid}))
    folder = tmp_path / "sweep"
    arguments = [path, "--sweep-dir", folder]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    process = subprocess.Popen(
        [sys.executable, ROOT / "bin" / "dpsgd-sweep", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        while len(list(folder.glob("runs/*/checkpoints/step-*.safetensors"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        shown, _ = process.communicate(timeout=100)
    finally:
        process.terminate()  # which ends what it has started, too
        process.wait(timeout=100)

    assert process.returncode == 130
    assert "stopped; the same command goes on" in shown
    assert statuses(folder) == ["unfinished", "waiting"]
    (log,) = folder.glob("logs/*.log")
    assert "checkpoint written; go on with" in log.read_text()
    assert run(*arguments, "--plan") == 0
    assert "unfinished" in capsys.readouterr().out

    (begun,) = folder.glob("runs/*/config.yaml")
    written = begun.stat().st_mtime_ns
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""
    assert statuses(folder) == ["finished", "finished"]
    assert begun.stat().st_mtime_ns == written  # by whoever starts a run
    assert not (folder / "abandoned").exists()
