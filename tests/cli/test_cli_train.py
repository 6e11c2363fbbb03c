import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_runs import (
    command,
    dpsgd_train,
    read_lines,
    small_config,
    start,
    write_config,
)

from dpsgd.config import load_config
from dpsgd.data import Store
from dpsgd.data.store import StoreWriter
from dpsgd.errors import DataError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run through bin/dpsgd-train in a folder with brackets, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"privacy.target_epsilon": 0.5, "privacy.noise_multiplier": None}
    config = write_config(folder, changes)
    run = folder / "a [bold] run"
    done = command("dpsgd-train", config, "--run-dir", run, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return run, done.stdout


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def test_the_report_has_its_keys_with_sane_values(finished: tuple[Path, str]) -> None:
    report = report_of(finished[0])

    for key in ("test_accuracy", "test_accuracy_ema"):
        assert 0 <= report[key] <= 1
    assert list(report["per_class_accuracy"]) == list("0123456789")
    assert all(0 <= value <= 1 for value in report["per_class_accuracy"].values())
    assert sum(report["per_class_num_examples"].values()) == 360
    assert report["num_steps"] == 4
    assert report["delta"] == 1e-4
    assert report["noise_multiplier"] > 0.3
    assert report["views_per_second"] > 0
    assert report["peak_memory_bytes"] > 100e6
    assert 0 < report["train_seconds"] <= report["wall_time_seconds"]
    assert report["seeded"] is True
    assert report["outcome"] == "finished"
    assert report["versions"]["torch"]
    assert "commit" in report


def test_the_reported_epsilon_is_the_certified_bound_within_the_target(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    report = report_of(finished[0])
    sigma = report["noise_multiplier"]
    _, _, plan = start(tmp_path, {"privacy.noise_multiplier": sigma})

    assert report["epsilon"] == plan.epsilon.upper
    assert 0.49 < report["epsilon"] <= 0.5
    assert plan.epsilon.lower <= plan.epsilon.estimate <= report["epsilon"]


def test_a_run_leaves_all_its_files(finished: tuple[Path, str]) -> None:
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "plan.json",
        "report.json",
    }
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"]
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    report = report_of(run)
    for key in ("test_accuracy", "test_accuracy_ema", "test_loss", "test_loss_ema"):
        assert lines[-1][key] == report[key]
    assert lines[0]["epsilon"] < lines[1]["epsilon"] <= 0.5


def test_the_plan_is_left_for_readers_of_an_unfinished_run(
    finished: tuple[Path, str],
) -> None:
    run, _ = finished
    plan = json.loads((run / "plan.json").read_text())
    report = report_of(run)

    shared = ("delta", "unit", "noise", "noise_multiplier", "num_steps")
    for key in ("format", "epsilon", *shared):
        assert plan[key] == report[key]
    assert plan["num_examples"] == 1437
    assert plan["num_parameters"] == 78_650
    assert plan["seeded"] is True


def test_a_run_is_not_taken_for_an_unfinished_store(
    finished: tuple[Path, str],
) -> None:
    run, _ = finished
    with pytest.raises(DataError, match="is not a store; make one of your images"):
        Store(run)
    with (
        pytest.raises(DataError, match="is there already and is not a store; name"),
        StoreWriter(run, {"source": "images"}),
    ):
        pass


def test_the_config_in_the_run_directory_reads_back_equal(
    finished: tuple[Path, str],
) -> None:
    run, _ = finished

    assert load_config(run / "config.yaml") == small_config(
        {"privacy.target_epsilon": 0.5, "privacy.noise_multiplier": None}
    )


def test_output_that_is_no_terminal_is_plain_and_complete(
    finished: tuple[Path, str],
) -> None:
    run, shown = finished

    assert "\x1b" not in shown
    assert "\r" not in shown
    order = ["Privacy plan", "run directory: ", "step 2/4", "step 4/4", "Result, ("]
    positions = [shown.index(text) for text in order]
    assert positions == sorted(positions)
    assert f"run directory: {run}\n" in shown
    assert f"report: {run}/report.json\n" in shown
    assert ", 0.0001)-DP" in shown
    # In one line, however narrow: a warning that is cut is none.
    assert ", but seeded: NOT to be released as private\n" in shown


def test_plan_prints_each_quantity_and_trains_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpsgd.cli.train.train", None)

    assert dpsgd_train(config, "--plan", "--run-dir", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines]
    rows = {cell[0]: cell[1] for cell in cells if len(cell) == 2}
    assert rows["examples"].startswith("1,437")
    assert rows["sample rate"].startswith("0.0111")
    assert rows["expected batch"] == "16 examples"
    assert rows["steps"] == "4"
    assert rows["noise multiplier"] == "1"
    assert 0 < float(rows["epsilon (upper bound)"]) < 1
    assert rows["delta"] == "0.0001"
    assert rows["parameters"] == "78,650"
    assert "MiB" in rows["microbatch"]
    assert os.listdir(tmp_path) == ["small.yaml"]


def test_set_replaces_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    overrides = ["--set", "train.num_steps=3", "--set", "privacy.delta=2e-5"]

    assert dpsgd_train(config, "--plan", *overrides) == 0
    shown = capsys.readouterr().out
    assert "│ 3 " in shown
    assert "│ 2e-05 " in shown


def test_the_default_folder_is_named_after_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, {"train.num_steps": 1, "train.seed": None})

    assert dpsgd_train(config) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("small-20")
    assert report_of(run)["seeded"] is False


def test_a_spent_budget_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = start(tmp_path / "other")
    limit = run.ledger.epsilon_exactly(3) * 1.0001
    config = write_config(tmp_path, {"privacy.max_epsilon": limit})

    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "stopped early: the budget was spent after 3 of 4 steps" in shown
    report = report_of(tmp_path / "run")
    assert report["outcome"] == "budget_spent"
    assert report["num_steps"] == 3
    assert report["epsilon"] <= limit


def test_a_run_without_noise_says_that_it_guarantees_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path, {"privacy.noise_multiplier": 0, "train.num_steps": 1}
    )

    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "infinite: NO privacy guarantee" in shown
    assert "Result, NO privacy guarantee" in shown
    assert report_of(tmp_path / "run")["epsilon"] is None


def test_without_an_average_the_report_has_none(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"ema.decay": None, "train.num_steps": 1})

    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0
    report = report_of(tmp_path / "run")
    assert report["test_accuracy_ema"] is None
    assert 0 <= report["test_accuracy"] <= 1
