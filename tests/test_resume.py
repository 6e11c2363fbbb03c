"""A run that was stopped, killed or damaged ends like one that went straight on."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    ROOT,
    command,
    dpsgd_eval,
    dpsgd_train,
    read_lines,
    small_config,
    start,
    without_times,
    write_config,
)
from stopped_runs import contents, stop_after

from dpsgd.checkpoint import read_tensors
from dpsgd.config import with_absolute_paths

SGD = {"optimizer.momentum": 0.9, "train.num_steps": 10, "eval.every": 3}
ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.01,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 2,
    "train.num_steps": 10,
    "eval.every": 4,
    "report.unprotected_metrics": True,
}
NO_AVERAGE = {"ema.decay": None, "train.num_steps": 10}


def assert_same_run(one: Path, two: Path) -> None:
    """Asserts equal weights, bit for bit, best weights, and evaluations."""
    name = "model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    best = [
        load_file(run / "checkpoints" / "best.safetensors", "cpu") for run in (one, two)
    ]
    assert best[0].keys() == best[1].keys()
    assert all(torch.equal(leaf, best[1][key]) for key, leaf in best[0].items())
    lines = [
        [without_times(line) for line in read_lines(run / "metrics.jsonl")]
        for run in (one, two)
    ]
    assert lines[0] == lines[1]


def test_a_checkpoint_holds_all_that_a_state_counts(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)
    counts = {one.name: getattr(state, one.name) for one in fields(state)}
    for name in ("params", "ema", "optimizer"):
        del counts[name]
    for number, name in enumerate(counts):
        counts[name] = type(counts[name])(3 + number)
        setattr(state, name, counts[name])
    run.save(state)
    _, facts = read_tensors(tmp_path / "step-00000003.safetensors")
    _, resumed, _ = start(tmp_path, resume=True)

    assert {name: facts[name] for name in counts} == counts
    assert {name: getattr(resumed, name) for name in counts} == counts


@pytest.mark.parametrize(
    ("changes", "stop"),
    [(SGD, 4), (SGD, 6), (ADAMW, 3), (NO_AVERAGE, 5)],
    ids=["sgd", "sgd_at_an_evaluation", "adamw", "no_average"],
)
def test_resumed_run_is_bit_identical(
    tmp_path: Path, changes: dict[str, Any], stop: int
) -> None:
    config = write_config(tmp_path, changes)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert dpsgd_train(config, "--run-dir", straight) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, stop, signal.SIGTERM)
        assert dpsgd_train(config, "--run-dir", broken) == 143
    assert not (broken / "model.safetensors").exists()
    assert dpsgd_train("--resume", broken) == 0

    assert_same_run(straight, broken)
    steps = [
        line["step"]
        for line in read_lines(broken / "metrics.jsonl")
        if "unprotected" not in line
    ]
    assert len(steps) == len(set(steps)) > 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_leaves_a_checkpoint_and_its_own_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    config = write_config(tmp_path, {"runtime.checkpoint_every": 100})
    before = signal.getsignal(number)
    stop_after(monkeypatch, 3, number)

    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == code
    assert (tmp_path / "run/checkpoints/step-00000003.safetensors").exists()
    shown = capsys.readouterr().out
    assert "stopped after step 3, checkpoint written" in shown
    assert f"bin/dpsgd-train --resume {tmp_path / 'run'}" in shown
    assert signal.getsignal(number) == before


def test_ctrl_c_before_training_is_told_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpsgd.cli.train.assemble", interrupt)

    assert dpsgd_train(write_config(tmp_path), "--run-dir", tmp_path / "run") == 130
    assert capsys.readouterr().err == "interrupted\n"


def wait_for(process: "subprocess.Popen[str]", ready: Callable[[], bool]) -> None:
    """Waits until something is there, or the process has ended."""
    while process.poll() is None and not ready():
        time.sleep(0.002)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sums round by the number of threads, which conftest.py sets in this process.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    changes = {
        "train.num_steps": 40,
        "eval.every": 5,
        "privacy.expected_batch_size": 32,
        "optimizer.momentum": 0.9,
    }
    config = write_config(tmp_path, changes)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert dpsgd_train(config, "--run-dir", straight) == 0
    rng = random.Random(time.time_ns())
    checkpoints = broken / "checkpoints"

    def newest() -> int:
        return max((int(p.stem[5:]) for p in checkpoints.glob("step-*rs")), default=0)

    arguments = [config, "--run-dir", str(broken)]
    killed = 0
    for _ in range(3):
        reached = newest()
        train = [sys.executable, str(ROOT / "bin/dpsgd-train"), *arguments]
        with subprocess.Popen(train, stdout=subprocess.DEVNULL, text=True) as process:
            wait_for(process, lambda reached=reached: newest() > reached)
            time.sleep(rng.uniform(0, 0.3))
            killed += process.poll() is None
            process.kill()
        arguments = ["--resume", str(broken)]
    done = command("dpsgd-train", *arguments)

    assert done.returncode == 0, done.stderr
    assert killed >= 1
    assert_same_run(straight, broken)
    steps = [line["step"] for line in read_lines(broken / "metrics.jsonl")]
    assert steps == list(range(5, 41, 5))


def test_a_run_finds_its_data_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"data.train": "train", "data.test": ("a", "b")}
    config = small_config({"data.source": "parquet", **files})
    monkeypatch.chdir(tmp_path)
    data = with_absolute_paths(config).data

    assert data.train == str(tmp_path / "train")
    assert data.test == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert with_absolute_paths(small_config()) == small_config()


def test_a_run_that_began_with_a_setting_for_nothing_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a setting was not always refused."""
    config = write_config(tmp_path, {"optimizer.betas": [0.8, 0.9]})
    run = tmp_path / "run"
    with monkeypatch.context() as before:
        before.setattr("dpsgd.config.loader.unused_settings", lambda _: {})
        assert dpsgd_train(config, "--run-dir", run) == 0
    capsys.readouterr()

    assert dpsgd_train("--resume", run) == 0
    assert dpsgd_eval(run) == 0
    capsys.readouterr()
    assert dpsgd_eval(run, "--set", "data.test=mine.parquet") == 2
    assert capsys.readouterr().err.splitlines() == [
        "data.test=mine.parquet: means nothing with data.source=digits; remove it, or "
        "take a source of files"
    ]


def test_damaged_newest_checkpoint_is_named_and_an_older_one_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert dpsgd_train(config, "--run-dir", straight) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        assert dpsgd_train(config, "--run-dir", broken) == 143
    newest = broken / "checkpoints" / "step-00000003.safetensors"
    whole = newest.read_bytes()
    half = len(whole) // 2
    for content in (whole[:-100], whole[:half] + b"damage" + whole[half + 6 :]):
        newest.write_bytes(content)
        before = contents(broken)
        capsys.readouterr()

        assert dpsgd_train("--resume", broken) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"checkpoint={newest}: is missing or damaged (")
        assert line.endswith("delete it to go on from an older one, if there is one")
        assert contents(broken) == before

    newest.unlink()
    assert dpsgd_train("--resume", broken) == 0
    assert_same_run(straight, broken)


def test_a_finished_run_changes_nothing_and_says_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert dpsgd_train(write_config(tmp_path), "--run-dir", run) == 0
    before = contents(run)
    first = capsys.readouterr().out.split("Accuracy by class")[1]

    assert dpsgd_train("--resume", run) == 0
    after = contents(run)
    assert capsys.readouterr().out.split("Accuracy by class")[1] == first
    assert before.pop("report.json") != after.pop("report.json")  # written anew
    assert after == before


def test_resuming_without_a_run_or_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpsgd_train("--resume", tmp_path / "nothing") == 2
    assert "holds no run (config.yaml is missing)" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(Path(write_config(tmp_path)).read_text())
    assert dpsgd_train("--resume", tmp_path) == 2
    assert f"--resume={tmp_path}: holds no checkpoint" in capsys.readouterr().err
