import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import leave_run

from dpsgd.errors import ConfigError
from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.plan import SweepPlan, SweepRun, read_sweep
from dpsgd.sweep.processes import Slot, run_all, slots_of, train_command

TWO = [Slot("a", {"SLOT": "a"}), Slot("b", {"SLOT": "b"})]


def run(
    folder: SweepFolder,
    plan: SweepPlan,
    script: Callable[[SweepRun], str],
    *,
    slots: list[Slot] = TWO,
    stop_requested: Callable[[], bool] = lambda: False,
    on_look: Callable[[Mapping[int, str]], None] = lambda working: None,
) -> None:
    """Runs a shell script in place of each training."""
    run_all(
        folder,
        plan.runs,
        slots,
        command=lambda one: ["sh", "-c", script(one)],
        on_look=on_look,
        stop_requested=stop_requested,
    )


def test_each_slot_holds_one_process_and_all_runs_are_made(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    looks: list[Mapping[int, str]] = []
    run(folder, plan, lambda one: "echo $SLOT; sleep 0.3", on_look=looks.append)

    assert max(len(working) for working in looks) == 2
    for working in looks:
        assert len(set(working.values())) == len(working)
    assert looks[-1] == {}
    said = [folder.log(one).read_text().strip() for one in plan.runs]
    assert set(said) == {"a", "b"}


def test_a_failure_is_noted_and_the_others_go_on(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    scripts = {1: "echo 'field=1: rule; remedy' >&2; exit 2", 2: "exit 143"}
    run(folder, plan, lambda one: scripts.get(one.index, "exit 0"))

    states = [folder.state(one) for one in plan.runs]
    assert [state.status for state in states] == ["waiting", "failed"] + ["waiting"] * 2
    assert states[1].error == "field=1: rule; remedy"


def test_a_stop_lets_every_process_save_and_starts_no_other(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    on_stop = "trap 'sleep 0.3; echo saved; exit 143' TERM"
    saving = f"{on_stop}; echo up; while :; do sleep 0.05; done"

    def both_are_up() -> bool:
        logs = [folder.log(one) for one in plan.runs[:2]]
        return all(log.exists() and "up" in log.read_text() for log in logs)

    run(folder, plan, lambda one: saving, stop_requested=both_are_up)

    for one in plan.runs[:2]:
        assert folder.log(one).read_text() == "up\nsaved\n"
        assert folder.state(one).status != "failed"
    assert not folder.log(plan.runs[2]).exists()


def test_a_run_that_is_stopped_before_it_can_save_has_not_failed(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    started = time.monotonic()
    run(
        folder,
        plan,
        lambda one: "exec sleep 60",
        stop_requested=lambda: time.monotonic() - started > 0.5,
    )

    assert [folder.state(one).status for one in plan.runs] == ["waiting"] * 4


def test_an_error_of_ours_leaves_no_orphan(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    def defect(working: Mapping[int, str]) -> None:
        for one in plan.runs[:2]:
            while not folder.log(one).read_text().endswith("\n"):
                time.sleep(0.05)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(folder, plan, lambda one: "echo $$; exec sleep 60", on_look=defect)
    for one in plan.runs[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(folder.log(one).read_text()), 0)


def test_a_signal_to_the_group_of_the_sweep_does_not_reach_its_runs(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    run(folder, plan, lambda one: "ps -o pgid= -p $$")

    groups = {int(folder.log(one).read_text()) for one in plan.runs}
    assert os.getpgrp() not in groups
    assert len(groups) == 4


def test_logs_are_added_to_and_complaints_begin_anew(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    for _ in range(2):
        run(folder, plan, lambda one: "echo out; echo err >&2")

    assert folder.log(plan.runs[0]).read_text() == "out\nout\n"
    assert folder.errors(plan.runs[0]).read_text() == "err\n"


def test_a_folder_that_takes_no_logs_is_told(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    folder.log(plan.runs[0]).mkdir()

    told = r"--sweep-dir=.*: cannot be written \(Is a directory\); give access"
    with pytest.raises(ConfigError, match=told):
        run(folder, plan, lambda one: "exit 0")


def test_a_run_is_started_once_and_then_gone_on_with(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    first = plan.runs[0]
    directory = str(folder.directory(first).path)
    started = train_command(folder, plan, first)
    leave_run(folder, first, is_finished=False)

    settings = ["--set", "optimizer.learning_rate=0.5", "--set", "train.seed=0"]
    assert started[-len(settings) - 3 :] == [
        str(folder.base(plan)),
        "--run-dir",
        directory,
        *settings,
    ]
    assert train_command(folder, plan, first)[-2:] == ["--resume", directory]


def test_the_trainer_that_is_started_is_the_one_of_this_package(
    folder: SweepFolder,
    plan: SweepPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "dpsgd").mkdir()  # a folder of that name where the sweep is started
    (tmp_path / "dpsgd" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    *_, first = train_command(folder, plan, plan.runs[0])[:2]
    assert first == "-P"
    script = "import dpsgd, sys; print(dpsgd.__file__)"
    run_all(
        folder,
        plan.runs[:1],
        TWO,
        command=lambda one: [sys.executable, "-P", "-c", script],
        on_look=lambda working: None,
        stop_requested=lambda: False,
    )

    import dpsgd

    assert folder.log(plan.runs[0]).read_text().strip() == dpsgd.__file__


@pytest.mark.parametrize(
    ("device", "num_gpus", "environment", "slots"),
    [
        ("cpu", 0, {}, [("cpu", {}), ("cpu", {})]),
        ("cpu", 4, {}, [("cpu", {}), ("cpu", {})]),
        ("auto", 0, {}, [("cpu", {}), ("cpu", {})]),
        (
            "auto",
            2,
            {},
            [
                ("GPU 0", {"CUDA_VISIBLE_DEVICES": "0"}),
                ("GPU 1", {"CUDA_VISIBLE_DEVICES": "1"}),
            ],
        ),
        (
            "cuda",
            1,
            {"CUDA_VISIBLE_DEVICES": " 3"},
            [("GPU 3", {"CUDA_VISIBLE_DEVICES": "3"})],
        ),
    ],
)
def test_gpus_are_handed_out_one_by_one(
    sweep_file: Callable[..., Path],
    device: str,
    num_gpus: int,
    environment: dict[str, str],
    slots: list[tuple[str, dict[str, str]]],
) -> None:
    plan = read_sweep(
        sweep_file(grid={"train.seed": [0]}, set={"runtime.device": device})
    )
    threads = {"OMP_NUM_THREADS": "1"}
    found = slots_of(
        plan, jobs=2, num_gpus=num_gpus, environment={**threads, **environment}
    )

    assert [(slot.name, dict(slot.environment)) for slot in found] == slots


def test_cores_are_shared_among_processes_unless_the_user_has_shared_them(
    plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    def threads(jobs: int) -> list[Any]:
        slots = slots_of(plan, jobs=jobs, num_gpus=0, environment={})
        return [slot.environment.get("OMP_NUM_THREADS") for slot in slots]

    assert threads(1) == [None]
    assert threads(3) == ["2"] * 3
    assert threads(20) == ["1"] * 20


def test_a_certain_gpu_cannot_be_asked_for(sweep_file: Callable[..., Path]) -> None:
    plan = read_sweep(sweep_file(grid={"runtime.device": ["cuda:1"]}))

    with pytest.raises(ConfigError, match=r"runtime\.device=cuda:1: .*; set auto"):
        slots_of(plan, jobs=1, num_gpus=2, environment={})
