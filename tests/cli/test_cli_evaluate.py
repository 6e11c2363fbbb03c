import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import command, dpsgd_eval, dpsgd_train, write_config

import dpsgd.train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert dpsgd_train(write_config(folder), "--run-dir", folder / "run") == 0
    return folder / "run"


def measured(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert dpsgd_eval(*arguments, "--json") == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


@pytest.mark.parametrize(("weights", "suffix"), [("last", ""), ("ema", "_ema")])
def test_json_equals_the_report(
    run: Path, capsys: pytest.CaptureFixture[str], weights: str, suffix: str
) -> None:
    report = json.loads((run / "report.json").read_text())
    facts = measured(capsys, run, "--weights", weights)

    assert facts["weights"] == weights
    assert facts["step"] == 4
    assert facts["accuracy"] == report[f"test_accuracy{suffix}"]
    assert facts["loss"] == pytest.approx(report[f"test_loss{suffix}"], rel=1e-6)
    assert facts["accuracy"] <= facts["top5_accuracy"] <= 1
    assert facts["num_examples"] == 360
    if weights == "ema":
        assert facts["per_class_accuracy"] == report["per_class_accuracy"]
        assert facts["largest_gap"] == report["largest_gap"]


def test_the_average_is_the_default(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured(capsys, run) == measured(capsys, run, "--weights", "ema")


def test_tables_for_people(run: Path) -> None:
    done = command("dpsgd-eval", run)

    assert (done.returncode, done.stderr) == (0, "")
    for text in ("top-1", "top-5", "loss", "largest gap (", "After 4 steps", "ema"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout


def test_an_unfinished_run_is_measured_at_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run: Any, state: Any) -> Any:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(run, state)

    take_step = dpsgd.train.train_step
    monkeypatch.setattr(dpsgd.train, "train_step", interrupted)
    run = tmp_path / "run"
    config = write_config(tmp_path, {"eval.every": 3})
    assert dpsgd_train(config, "--run-dir", run) == 143
    line = json.loads((run / "metrics.jsonl").read_text())

    facts = measured(capsys, run, "--weights", "last")
    assert facts["step"] == line["step"] == 3
    assert facts["accuracy"] == line["test_accuracy"]
    facts = measured(capsys, run, "--weights", "ema")
    assert facts["accuracy"] == line["test_accuracy_ema"]


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert dpsgd_eval(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_faults_are_told_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no run (config.yaml is missing)" in told(capsys, tmp_path)
    assert "invalid choice: 'best'" in told(capsys, run, "--weights", "best")
    assert "required: run_dir" in told(capsys)
    wider = ("--set", "runtime.device=abacus")
    assert "runtime.device=abacus: must be" in told(capsys, run, *wider)

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"checkpoint={weights}: is missing or damaged" in told(capsys, copy)
    weights.unlink()
    shutil.rmtree(copy / "checkpoints")
    assert "holds no checkpoint" in told(capsys, copy)


def test_weights_of_another_network_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert dpsgd_eval(run, "--set", "model.width=2") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    for line in lines:
        assert line.startswith("weights.")
        assert line.endswith("; use the network that the run began with")


def test_an_average_that_was_not_kept_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"ema.decay": None, "train.num_steps": 1})
    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0

    assert measured(capsys, tmp_path / "run")["weights"] == "last"
    line = told(capsys, tmp_path / "run", "--weights", "ema")
    assert "--weights=ema: the run kept no such weights" in line
