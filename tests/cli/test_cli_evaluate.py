import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import command, dpsgd_eval, dpsgd_train, write_config, write_parquet

import dpsgd.train
from dpsgd.privacy import rounded_up


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
    for text in ("top-1", "top-5", "loss", "largest gap", "After 4 steps", "ema"):
        assert text in done.stdout
    report = json.loads((run / "report.json").read_text())
    guarantee = f"{run}: ({rounded_up(report['epsilon'])}, 0.0001)-DP per example"
    assert f"{guarantee}, but seeded: NOT to be released" in " ".join(
        done.stdout.split()
    )
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
    said = told(capsys, copy)
    assert f"checkpoint={weights}: is missing or damaged" in said
    assert "; move it away, and the newest checkpoint is taken" in said
    weights.unlink()
    shutil.rmtree(copy / "checkpoints")
    assert told(capsys, copy).startswith(f"run_dir={copy}: holds no weights yet, as")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on parquet files, and one without noise; the test files tell ages."""
    folder = tmp_path_factory.mktemp("twins")
    changes = {
        "data.source": "parquet",
        "data.train": write_parquet(folder / "train.parquet", owner=["me"] * 30),
        "data.test": write_parquet(
            folder / "test.parquet", age=["old", "new", "new"] * 4
        ),
        "data.num_examples": 30,
        "privacy.delta": 0.01,
        "train.num_steps": 1,
    }
    for name, noise in (("private", 1.0), ("plain", 0.0)):
        config = write_config(folder, {**changes, "privacy.noise_multiplier": noise})
        assert dpsgd_train(config, "--run-dir", folder / name) == 0
    return folder / "private", folder / "plain"


GROUPED = ("--set", "data.group_column=age")


def test_a_run_is_compared_with_its_twin_by_class_and_group(
    twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, twin = twins
    alone = [measured(capsys, one, *GROUPED) for one in twins]
    facts = measured(capsys, run, "--twin", twin, *GROUPED)

    assert facts["twin"] == {
        name: value for name, value in alone[1].items() if name != "outcomes"
    }
    by_class, by_age = facts["outcomes"]
    assert (by_class["kind"], by_age["kind"]) == ("class", "age")
    assert [one["num_examples"] for one in by_age["groups"]] == [8, 4]
    for kind, outcomes in (("per_class", by_class), ("per_group", by_age)):
        for one in outcomes["groups"]:
            mine, theirs = (each[f"{kind}_accuracy"][one["name"]] for each in alone)
            assert (one["accuracy"], one["twin_accuracy"]) == (mine, theirs)
            assert one["change"] == pytest.approx(mine - theirs)
            assert one["interval"][0] <= mine <= one["interval"][1]
    assert ", 0.01)-DP per example, but seeded: NOT to be" in facts["guarantee"]
    assert facts["twin"]["guarantee"] == "NO privacy guarantee"


def test_the_comparison_is_shown_with_both_guarantees(
    twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, twin = twins
    capsys.readouterr()
    assert dpsgd_eval(run, "--twin", twin, *GROUPED) == 0
    shown = capsys.readouterr().out

    titles = ["Accuracy by class, %", "Accuracy by age, %", "twin (ema)", f"{run}: ("]
    positions = [shown.index(text) for text in titles]
    assert positions == sorted(positions)
    assert f"twin {twin}: NO privacy guarantee\n" in shown
    assert "one in twenty misses by chance" in shown


def test_groups_are_part_of_the_report_of_training(
    twins: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--set", "data.group_column=age", "--run-dir", tmp_path / "run")
    assert dpsgd_train(twins[0] / "config.yaml", *config) == 0

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["per_group_num_examples"] == {"new": 8, "old": 4}
    assert report["per_group_accuracy"].keys() == {"new", "old"}
    assert "Accuracy by age, %" in capsys.readouterr().out
    assert (
        dpsgd_train("--resume", tmp_path / "run", "--set", "data.group_column=null")
        == 0
    )


def test_an_unfit_twin_is_told(
    run: Path,
    twins: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = told(capsys, run, "--twin", tmp_path)
    assert line.startswith(f"run_dir={tmp_path}: holds no run")
    capsys.readouterr()
    assert dpsgd_eval(run, "--twin", twins[1]) == 2  # three classes, and digits are ten
    line, *_ = capsys.readouterr().err.splitlines()
    assert line.startswith("twin.classifier.")
    assert line.endswith("and data of its classes")


def test_weights_of_another_network_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert dpsgd_eval(run, "--set", "model.width=2") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    for line in lines:
        assert line.startswith("weights.")
        assert "; use the network that the run began with, and" in line


def test_an_average_that_was_not_kept_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"ema.decay": None, "train.num_steps": 1})
    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0

    assert measured(capsys, tmp_path / "run")["weights"] == "last"
    line = told(capsys, tmp_path / "run", "--weights", "ema")
    assert "--weights=ema: the run kept no such weights" in line
