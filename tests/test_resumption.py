"""What goes on as another run is refused; steps taken otherwise get other noise."""

import operator
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_runs import ROOT, dpsgd_train, read_lines, write_config
from stopped_runs import contents, stop_after

import dpsgd.cli.train
import dpsgd.resumption
import dpsgd.train
from dpsgd.checkpoint import read_tensors, write_tensors
from dpsgd.report import RunDirectory


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
