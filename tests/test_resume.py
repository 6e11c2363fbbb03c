import operator
import os
import random
import shutil
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
from PIL import Image
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

import dpsgd.cli.train
import dpsgd.resumption
import dpsgd.train
from dpsgd.checkpoint import read_tensors, write_tensors
from dpsgd.config import with_absolute_paths
from dpsgd.report import RunDirectory

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


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Makes a real signal arrive in the middle of one step."""
    take_step = dpsgd.train.train_step

    def interrupted(run: Any, state: Any) -> Any:
        passes = take_step(run, state)
        if state.step == step:
            os.kill(os.getpid(), number)
        return passes

    monkeypatch.setattr(dpsgd.train, "train_step", interrupted)


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


def write_folder(root: Path, num_images: int) -> str:
    """Writes random grey images of two classes as an image folder."""
    rng = random.Random(len(str(root)))
    for index in range(num_images):
        folder = root / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.frombytes("L", (8, 8), rng.randbytes(64))
        image.save(folder / f"{index:03d}.png")
    return str(root)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run on image folders, stopped after two of four steps; its folder."""
    changes = {
        "data.source": "image_folder",
        "data.train": write_folder(tmp_path / "train", 40),
        "data.test": write_folder(tmp_path / "test", 10),
        "data.num_examples": 40,
        "privacy.delta": 1e-3,
    }
    config = write_config(tmp_path, changes)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 143
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("privacy.noise_multiplier=2", "privacy.noise_multiplier=2.0: the checkpoint"),
        ("privacy.expected_batch_size=8", "privacy.expected_batch_size=8.0: the"),
        ("privacy.clipping_norm=2", "privacy.clipping_norm=2.0: the checkpoint has 1"),
        ("privacy.max_epsilon=9", "privacy.max_epsilon=9.0: the checkpoint has null"),
        ("model.width=2", "model.width=2: the checkpoint has 1"),
        ("train.seed=8", "train.seed=8: the checkpoint has 7"),
        ("train.num_steps=5", "train.num_steps=5: the checkpoint has 4"),
        ("data.num_examples=50", "data.num_examples=50: the checkpoint has 40"),
        ("optimizer.learning_rate=2", "optimizer.learning_rate=2.0: the checkpoint"),
    ],
)
def test_another_run_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str], override: str, told: str
) -> None:
    before = contents(stopped)
    capsys.readouterr()

    assert dpsgd_train("--resume", stopped, "--set", override) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
    assert line.endswith("go on with what the run began with, or start a new one")
    assert contents(stopped) == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_pixels_are_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    before = contents(stopped)
    path = stopped.parent / split / "class0" / "000.png"
    with Image.open(path) as image:
        image.putpixel((3, 3), image.getpixel((3, 3)) ^ 1)
        image.save(path)
    capsys.readouterr()

    assert dpsgd_train("--resume", stopped) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.{split}=...: holds other examples than the run's")
    assert contents(stopped) == before


def test_data_may_move_and_runtime_may_change(stopped: Path) -> None:
    moved = stopped.parent / "moved"
    (stopped.parent / "train").rename(moved)

    changes = [f"data.train={moved}", "runtime.microbatch_size=5", "eval.every=1"]
    overrides = [word for change in changes for word in ("--set", change)]
    assert dpsgd_train("--resume", stopped, *overrides) == 0


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


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def noise_nonce(run: Path) -> str:
    _, facts = read_tensors(newest_checkpoint(run))
    return str(facts["streams"]["noise_nonce"])


def test_noise_keeps_its_key_only_where_steps_are_repeated_bit_for_bit(
    stopped: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(stopped, other)
    assert dpsgd_train("--resume", stopped) == 0
    assert dpsgd_train("--resume", other, "--set", "runtime.microbatch_size=5") == 0

    assert noise_nonce(stopped) == ""
    assert len(noise_nonce(other)) == 32
    weights = [read_tensors(run / "model.safetensors")[0] for run in (stopped, other)]
    # The same noise would leave a difference of rounding, which shows the data.
    assert not torch.allclose(*(one["last/classifier.bias"] for one in weights))


def test_another_version_of_the_code_repeats_no_noise(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of its lines round, nobody can tell: any of them may."""
    package = stopped.parent / "package"
    shutil.copytree(ROOT / "dpsgd" / "kernels", package / "kernels")
    monkeypatch.setattr(dpsgd.resumption, "__file__", str(package / "resumption.py"))
    identities = set()
    for line in ("", "# another line"):
        with (package / "kernels" / "make_views.py").open("a") as file:
            file.write(line)
        identities.add(dpsgd.resumption._code.__wrapped__())
    assert len(identities) == 2

    monkeypatch.setattr(dpsgd.resumption, "_code", lambda: "another")
    assert dpsgd_train("--resume", stopped) == 0
    assert len(noise_nonce(stopped)) == 32


@pytest.mark.parametrize(
    "patch",
    [
        lambda to: to.setattr("dpsgd.resumption.np.__version__", "0.0"),
        lambda to: to.setattr("dpsgd.resumption._processor", lambda: "another"),
        lambda to: to.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
        lambda to: to.setenv("MKL_CBWR", "COMPATIBLE"),
    ],
    ids=["numpy", "processor", "onednn", "mkl"],
)
def test_what_rounds_or_draws_otherwise_repeats_no_noise(
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    patch: Callable[[pytest.MonkeyPatch], None],
) -> None:
    patch(monkeypatch)
    assert dpsgd_train("--resume", stopped) == 0
    assert len(noise_nonce(stopped)) == 32


def test_a_checkpoint_of_before_a_member_of_the_arithmetic_goes_on_with_new_noise(
    stopped: Path,
) -> None:
    path = newest_checkpoint(stopped)
    tensors, facts = read_tensors(path)
    for name in ("numpy", "processor", "environment"):
        del facts["arithmetic"][name]
    write_tensors(path, tensors, facts)

    assert dpsgd_train("--resume", stopped) == 0
    assert len(noise_nonce(stopped)) == 32


def test_the_kind_of_the_processor_is_told() -> None:
    assert dpsgd.resumption._processor() == dpsgd.resumption._processor.__wrapped__()
    assert dpsgd.resumption._processor().strip()


@pytest.mark.parametrize("override", ["runtime.microbatch_size=5", "eval.every=2"])
def test_steps_that_were_shown_are_not_taken_again_with_either_noise(
    stopped: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "test_accuracy": 0.5}\n')
    before = contents(stopped)
    capsys.readouterr()

    assert dpsgd_train("--resume", stopped, "--set", override) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--resume=...: step 99 was shown, the newest checkpoint is")
    assert contents(stopped) == before


def test_a_step_stays_shown_in_whatever_piece_of_the_run_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rarely = tmp_path / "run", ("--set", "eval.every=5")
    settings = {"train.num_steps": 6, "runtime.keep_checkpoints": 9}
    config = write_config(tmp_path, settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert dpsgd_train(config, "--run-dir", run) == 143
    with pytest.MonkeyPatch.context() as patch:  # does not evaluate where it begins
        stop_after(patch, 3, signal.SIGTERM)
        assert dpsgd_train("--resume", run, *rarely) == 143
    lost = [run / f"checkpoints/step-{step:08d}.safetensors" for step in (2, 3)]
    kept = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    capsys.readouterr()

    for options in ((), rarely, ("--set", "runtime.microbatch_size=5")):
        assert dpsgd_train("--resume", run, *options) == 2
        told = "step 2 was shown, the newest checkpoint is of step 1"
        assert told in capsys.readouterr().err
    for path, content in zip(lost, kept, strict=True):
        path.write_bytes(content)
    assert dpsgd_train("--resume", run) == 0
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == [2, 4, 6]


@pytest.mark.parametrize(
    ("member", "value"), [("sample_rate", 1e-3), ("noise_multiplier", 0.1)]
)
def test_a_checkpoint_whose_mechanism_is_not_the_settings_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str], member: str, value: float
) -> None:
    path = newest_checkpoint(stopped)
    tensors, facts = read_tensors(path)
    facts["mechanism"][member] = value
    write_tensors(path, tensors, facts)
    before = contents(stopped)
    capsys.readouterr()

    assert dpsgd_train("--resume", stopped) == 2
    assert f"mechanism.{member}: {value} != " in capsys.readouterr().err
    assert contents(stopped) == before


def without_settings(run: Path, *names: str) -> None:
    """Makes a checkpoint of it one of before there were these settings."""
    path = newest_checkpoint(run)
    tensors, facts = read_tensors(path)
    for name in names:
        section, _, key = name.partition(".")
        del facts["settings"][section][key]
    write_tensors(path, tensors, facts)


def test_a_checkpoint_of_before_a_setting_goes_on_with_its_default(
    stopped: Path,
) -> None:
    without_settings(stopped, "ema.warmup", "data.mixed_views", "optimizer.betas")

    assert dpsgd_train("--resume", stopped) == 0


def test_a_checkpoint_of_before_a_setting_is_refused_with_another_value(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_settings(stopped, "ema.warmup", "optimizer.learning_rate")
    before = contents(stopped)
    capsys.readouterr()

    assert dpsgd_train("--resume", stopped, "--set", "ema.warmup=3") == 2
    said = capsys.readouterr().err
    assert "ema.warmup=3.0: the checkpoint has 10.0" in said
    assert "optimizer.learning_rate=" in said  # it has no default
    assert contents(stopped) == before


def test_two_processes_do_not_train_in_one_folder(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDirectory(stopped).locked():
        assert dpsgd_train("--resume", stopped) == 2
    assert "another process is training in it" in capsys.readouterr().err
    assert dpsgd_train("--resume", stopped) == 0


def test_how_far_a_run_is_is_read_when_no_other_process_goes_on_with_it(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one that ended meanwhile would have released what is taken again."""
    held = []
    for what in ("CheckpointStore.newest", "last_evaluated_step", "assemble"):
        real = operator.attrgetter(what)(dpsgd.cli.train)

        def reads(
            *given: Any, real: Callable[..., Any] = real, what: str = what, **named: Any
        ) -> Any:
            held.append((what, RunDirectory(stopped).is_locked()))
            return real(*given, **named)

        monkeypatch.setattr(f"dpsgd.cli.train.{what}", reads)

    assert dpsgd_train("--resume", stopped) == 0
    assert held == [
        ("CheckpointStore.newest", True),
        ("last_evaluated_step", True),
        ("assemble", True),
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
