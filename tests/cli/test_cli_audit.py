import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_defects import DEFECTS
from small_runs import command, dpsgd_eval, remembering, write_config

from dpsgd.cli import report
from dpsgd.cli.audit import main
from dpsgd.privacy import examine

FULL_BATCH = {
    "model.name": "convnet",
    "model.depth": 1,
    "model.groups": 4,
    "privacy.expected_batch_size": 1_437,
    "privacy.noise_multiplier": 4.0,
    "train.num_steps": 2,
}


PLAIN = [
    *("--set", "privacy.noise_multiplier=null"),
    *("--set", "privacy.delta=null"),
]


def dpsgd_audit(folder: Path, *arguments: Any, changes: Any = None) -> int:
    config = write_config(folder, {**FULL_BATCH, **(changes or {})})
    numbers = ["--gradient-canaries", "400", "--image-canaries", "20"]
    words = [config, "--run-dir", folder / "run", *numbers, *arguments]
    with remembering():
        return main([str(word) for word in words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an audit, and what it printed."""
    folder = tmp_path_factory.mktemp("audited [bold]")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert dpsgd_audit(folder) == 0
    return folder / "run", printed.getvalue()


def test_the_command_says_how_it_is_used() -> None:
    done = command("dpsgd-audit", "--help")

    assert (done.returncode, done.stderr) == (0, "")
    for text in ("--gradient-canaries", "--image-canaries", "Exit code 0: the claim"):
        assert text in done.stdout


def test_an_audit_leaves_report_scores_and_picture_and_no_weights(
    finished: tuple[Path, str],
) -> None:
    run, _ = finished

    assert {path.name for path in run.iterdir()} == {
        "audit.png",
        "config.yaml",
        "report.json",
        "scores.json",
    }
    assert (run / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_follows_from_scores_and_claim(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    scores = json.loads((finished[0] / "scores.json").read_text())

    assert report["note"].endswith("no run with canaries may be released.")
    assert report["adjacency"] == "add-or-remove-one"
    assert report["num_steps"] == 2
    assert not report["is_refuted"]
    assert report["epsilon"] > 1.0  # of two full batches with noise 4
    assert {*scores} == {*report["canaries"]} == {"gradients", "images"}
    for kind, number in (("gradients", 400), ("images", 20)):
        found = examine(
            np.array(scores[kind]["scores"]),
            np.array(scores[kind]["is_in"]),
            epsilon=report["epsilon"],
            delta=report["delta"],
            confidence=report["confidence"],
        )
        told = report["canaries"][kind]
        assert told["num_canaries"] == number
        assert told["num_correct"] == found.guesses.num_correct
        assert told["epsilon_lower_bound"] == found.epsilon_lower_bound
        assert told["epsilon_if_gaussian"] == found.epsilon_if_gaussian


def test_a_table_tells_bounds_beside_the_claim(finished: tuple[Path, str]) -> None:
    _, printed = finished

    for text in ("Audit, claimed: (", "gradients", "images", "if Gaussian", "run"):
        assert text in printed
    assert "not refuted: the lower bounds, with 95% confidence each" in printed
    assert "\x1b" not in printed


def test_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    assert dpsgd_audit(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--run-dir={tmp_path / 'run'}: holds a run or other files")
    assert line.endswith("; name another folder")  # an audit cannot go on
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_audit_is_neither_reported_nor_measured_as_a_run(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    left = sorted(run.iterdir())

    for status in (report.main([str(run)]), dpsgd_eval(run)):
        assert status == 2
    first, second = capsys.readouterr().err.splitlines()
    for line in (first, second):
        assert line.startswith(f"run_dir={run}: holds an audit, whose run learned")
        assert line.endswith("; name the folder that bin/dpsgd-train made")
        assert "--resume" not in line
    assert sorted(run.iterdir()) == left


def test_an_audit_that_was_killed_is_not_taken_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpsgd.cli.audit.audit", killed)

    assert dpsgd_audit(tmp_path) == 130
    capsys.readouterr()
    assert report.main([str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds an audit" in line


def test_a_run_without_its_noise_is_refuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DEFECTS["no_noise"].plant(monkeypatch)

    assert dpsgd_audit(tmp_path) == 1
    assert "REFUTED: a lower bound passes the claim" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["is_refuted"]


def test_a_run_that_claims_nothing_is_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"privacy.noise_multiplier": 0.0, "train.num_steps": 1}

    assert dpsgd_audit(tmp_path, changes=changes) == 0
    assert "nothing is claimed" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["epsilon"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--confidence", "1"], "confidence=1.0: must be in (0, 1)"),
        (["--gradient-canaries", "-1"], "canaries=-1 and 20: must be at least 0"),
        (["--image-canaries", "400"], "--image-canaries=400: canaries are images of"),
        (["--image-canaries", "100000"], "--image-canaries=100000: canaries are"),
        (["--gradient-canaries", "100000"], "--gradient-canaries=100000: each needs"),
        (
            ["--gradient-canaries", "0", "--image-canaries", "0"],
            "canaries=0 and 0: must be at least 0, and one of them above",
        ),
        (["--set", "privacy.enabled=false", *PLAIN], "privacy.enabled=False: a run"),
        (["--set", "optimizer.name=adamw"], "optimizer.name=adamw: the auditor reads"),
    ],
)
def test_what_cannot_be_audited_is_refused_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    assert dpsgd_audit(tmp_path, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
