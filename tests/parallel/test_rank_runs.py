"""Runs of several ranks: their checkpoints, what they refuse, how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_scenarios as scenarios
from rank_processes import Arrays, RankGroup, alone
from small_runs import ROOT, dpsgd_train, read_lines, small_config, write_config

from dpsgd.checkpoint import CheckpointStore, read_tensors
from dpsgd.cli.launch import launch_of, run_of
from dpsgd.errors import CheckpointError, ConfigError
from dpsgd.parallel import Ranks, joined
from dpsgd.report import RunDirectory

pytestmark = pytest.mark.distributed

Groups = Callable[[int], RankGroup]
SMALL = {
    "model.name": "convnet",
    "model.depth": 2,
    "model.groups": 4,
    "optimizer.momentum": 0.9,
}
WHERE = [("none", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 4)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def assert_equal(one: Arrays, two: Arrays) -> None:
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name], err_msg=name)


def play(ranks: Groups, size: int, *task: Any) -> list[Any]:
    return ranks(size)(*task) if size > 1 else [alone(*task)]


@pytest.mark.parametrize(("mode", "size"), [("fsdp", 2), ("none", 1)])
def test_a_checkpoint_is_read_by_any_number_of_ranks(
    ranks: Groups, tmp_path: Path, mode: str, size: int
) -> None:
    changes = {**SMALL, "runtime.parallel": mode}
    saved = play(ranks, size, scenarios.trained, tmp_path, changes, 2)[0]["state"]

    for other_mode, other_size in WHERE:
        changes = {**SMALL, "runtime.parallel": other_mode}
        for one in play(ranks, other_size, scenarios.restored, tmp_path, changes):
            assert one["step"] == 2
            assert_equal(one["state"], saved)
            # Other ranks, other rounding: the same noise would show the data.
            same = (other_mode, other_size) == (mode, size)
            assert len(one["nonce"]) == (0 if same else 16)


def test_all_ranks_go_on_with_one_noise_key(ranks: Groups, tmp_path: Path) -> None:
    changes = {**SMALL, "runtime.parallel": "fsdp", "train.seed": None}
    ranks(4)(scenarios.trained, tmp_path, changes, 1)
    nonces = {one["nonce"] for one in ranks(4)(scenarios.restored, tmp_path, changes)}

    # The order of a sum of four is the library's, so nothing is taken to repeat.
    assert len(nonces) == 1
    assert len(nonces.pop()) == 16


def test_shards_are_whole_or_absent(ranks: Groups, tmp_path: Path) -> None:
    changes = {**SMALL, "runtime.parallel": "fsdp"}
    held = ranks(2)(scenarios.trained, tmp_path, changes, 1)
    folder = tmp_path / "step-00000001.shards"
    files = sorted(path.name for path in folder.iterdir())

    assert files == ["index.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert (tmp_path / "best.shards").resolve() == folder
    sizes = [
        sum(
            leaf.numel()
            for name, leaf in read_tensors(folder / file)[0].items()
            if name.startswith("params/")
        )
        for file in files[1:]
    ]
    assert sizes == [one["held"] for one in held]

    part = tmp_path / "step-00000002.part"  # as a killed save leaves it
    part.mkdir()
    (part / files[1]).write_bytes((folder / files[1]).read_bytes())
    assert CheckpointStore(tmp_path, keep=2).newest().facts["step"] == 1
    (folder / files[2]).write_bytes((folder / files[2]).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"step-00000001.shards: is missing or d"):
        CheckpointStore(tmp_path, keep=2).newest()


def test_old_shards_are_dropped_but_not_the_best(ranks: Groups, tmp_path: Path) -> None:
    changes = {**SMALL, "runtime.parallel": "fsdp", "runtime.keep_checkpoints": 1}
    for num_steps in (1, 2, 3):
        ranks(2)(scenarios.saved, tmp_path, changes, num_steps, num_steps == 1)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.shards",
        "step-00000001.shards",
        "step-00000003.shards",
    ]


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"train.seed": 8}, "settings"),
        ({"optimizer.learning_rate": 0.1}, "optimizer, settings"),
        ({"runtime.engine": "ghost"}, "arithmetic, runtime"),
        ({"eval.every": 3}, "eval"),
        ({"model.width": 2}, "network"),
    ],
)
def test_ranks_that_are_unlike_do_not_start(
    ranks: Groups, tmp_path: Path, odd: dict[str, Any], told: str
) -> None:
    changes = {**SMALL, "runtime.parallel": "ddp"}
    found = ranks(2)(scenarios.unlike, tmp_path, changes, odd)

    rule = f"ranks=2: rank 1 has another {told}"
    for one in found:
        assert one.startswith(f"ConfigError: {rule}")
    assert not list(tmp_path.iterdir())


def test_ranks_that_drift_apart_are_found_before_they_save(ranks: Groups) -> None:
    for one in ranks(2)(scenarios.drifted):
        assert "rank 1 has another parameters than rank 0" in one


def test_all_ranks_stop_when_one_is_asked_to(ranks: Groups, tmp_path: Path) -> None:
    changes = {
        **SMALL,
        "runtime.parallel": "ddp",
        "train.num_steps": 6,
        "eval.every": 6,
    }
    found = ranks(2)(scenarios.stopping, tmp_path, changes, 1)

    assert found == [("interrupted", 3, 15)] * 2
    assert CheckpointStore(tmp_path, keep=1).newest().facts["step"] == 3


def test_what_one_rank_sees_diverge_ends_all(ranks: Groups) -> None:
    for one in ranks(2)(scenarios.diverging):
        assert "training diverged: the parameters held inf or NaN" in one


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "runtime.parallel=none: 2 processes were started, and would each train"),
        (
            {"runtime.parallel": "ddp", "privacy.noise": "secure", "train.seed": None},
            "privacy.noise=secure: 2 ranks would each draw their own",
        ),
        (
            {"runtime.parallel": "ddp", "runtime.device": "cuda:0"},
            "runtime.device=cuda:0: names one device for 2 processes",
        ),
    ],
)
def test_settings_that_are_not_for_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    with (
        pytest.raises(ConfigError, match=told.replace(":", r"\:")),
        joined(small_config(changes)),
    ):
        raise AssertionError("joined")


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = small_config({"runtime.parallel": "ddp", "runtime.device": "auto"})

    with (
        pytest.raises(ConfigError, match="process 2 of this machine has no device"),
        joined(config),
    ):
        raise AssertionError("joined")


def torchrun(*arguments: str | Path, **options: Any) -> Any:
    """Runs a command on two ranks."""
    return subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
        },
        **options,
    )


def test_a_run_that_loses_a_rank_ends_at_once_and_goes_on_by_itself(
    ranks: Groups, tmp_path: Path
) -> None:
    changes = {
        **SMALL,
        "runtime.parallel": "fsdp",
        "train.num_steps": 4,
        "eval.every": 4,
    }
    config = write_config(tmp_path, changes)
    script = ROOT / "tests" / "parallel" / "dying_train.py"
    started = time.monotonic()
    done = torchrun("--max-restarts=1", script, config, "--run-dir", tmp_path / "run")
    seconds = time.monotonic() - started

    assert done.returncode == 0, done.stderr
    assert seconds < 60
    # Rank 1 was killed in step 3; the other says so, and both begin again at step 2.
    assert "rank 0 lost another one in the" in done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [4]
    weights, _ = read_tensors(tmp_path / "run" / "model.safetensors")
    straight = ranks(2)(scenarios.trained, tmp_path / "straight", changes, 4)[0]
    for name, leaf in straight["state"].items():
        if name.startswith("params/"):
            found = weights[name.replace("params/", "last/")].numpy()
            np.testing.assert_array_equal(found, leaf, err_msg=name)


@pytest.mark.gpu(2)
def test_a_run_that_loses_a_gpu_goes_on_by_itself(tmp_path: Path) -> None:
    changes = {
        **SMALL,
        "runtime.parallel": "fsdp",
        "runtime.device": "cuda",
        "train.num_steps": 4,
        "eval.every": 4,
    }
    config = write_config(tmp_path, changes)
    script = ROOT / "tests" / "parallel" / "dying_train.py"
    done = torchrun("--max-restarts=1", script, config, "--run-dir", tmp_path / "run")

    assert done.returncode == 0, done.stderr
    # NCCL itself would wait without a word until torchrun kills the rank.
    assert "rank 0 lost another one in the" in done.stderr
    assert f"exitcode: -{int(signal.SIGKILL)}" in done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [4]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))]
)
def test_a_rank_that_fails_says_why_and_ends_the_others(
    tmp_path: Path, device: str
) -> None:
    changes = {**SMALL, "runtime.parallel": "ddp", "runtime.device": device}
    config = write_config(tmp_path, changes)
    script = ROOT / "tests" / "parallel" / "dying_train.py"
    started = time.monotonic()
    done = torchrun(script, "fails", config, "--run-dir", tmp_path / "run")

    assert done.returncode != 0
    assert time.monotonic() - started < 90
    assert "data.train=...: row 3 does not decode; mend it" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_ranks_go_on_only_where_no_other_process_trains(tmp_path: Path) -> None:
    changes = {**SMALL, "runtime.parallel": "ddp", "train.num_steps": 1}
    config, run = write_config(tmp_path, changes), tmp_path / "run"
    assert dpsgd_train(config, "--run-dir", run) == 0
    with RunDirectory(run).locked():
        done = torchrun(ROOT / "bin" / "dpsgd-train", "--resume", run)

    assert done.returncode != 0
    assert f"--resume={run}: another process is training in it" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_a_restarted_process_leaves_the_runs_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", write_config(tmp_path, SMALL)
    assert dpsgd_train(config, "--run-dir", run) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert dpsgd_train(config) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert dpsgd_train(config, "--run-dir", run) == 2

    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("--run-dir=null: torchrun may start the processes again")
    assert "holds a run or other files already" in shown[1]


def test_a_launch_without_an_id_is_told_from_one_in_another_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There torchrun is process 1, too."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "environment.json").write_text(json.dumps(launch_of()))

    def is_ours() -> bool:
        return run_of(None, tmp_path, Path("config.yaml"), Ranks())[1]

    assert is_ours()
    with monkeypatch.context() as other:
        other.setattr("dpsgd.cli.launch.gethostname", lambda: "other")
        assert not is_ours()
    with monkeypatch.context() as other:
        (tmp_path / "boot").write_text("other")
        other.setattr("dpsgd.cli.launch._BOOT", tmp_path / "boot")
        assert not is_ours()
    with monkeypatch.context() as other:
        other.setattr("dpsgd.cli.launch._START_TIME", 0)  # as if begun at another time
        assert not is_ours()
    with monkeypatch.context() as other:
        other.setattr("os.getppid", os.getpid)
        assert not is_ours()
    monkeypatch.setattr("dpsgd.cli.launch._BOOT", tmp_path / "absent")
    (tmp_path / "environment.json").write_text(json.dumps(launch_of()))
    assert not is_ours()  # nobody knows
