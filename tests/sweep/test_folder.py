import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sweep_runs import leave_run
from unwilling_disks import refused

from dpsgd.errors import ConfigError, UserError
from dpsgd.sweep.folder import RunState, SweepFolder
from dpsgd.sweep.plan import SweepPlan, read_sweep


def test_a_folder_keeps_what_the_sweep_was_made_of(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    names = [path.name for path in folder.path.glob("*.yaml")]

    assert len(names) == 2
    assert folder.base(plan).read_bytes() == plan.base.read_bytes()
    folder.create(plan)
    assert sorted(path.name for path in folder.path.glob("*.yaml")) == sorted(names)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, plan: SweepPlan) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match="holds other files than a sweep's"):
        SweepFolder(tmp_path / "other").create(plan)
    with pytest.raises(ConfigError, match="holds other files than a sweep's"):
        SweepFolder(tmp_path / "other" / "notes.txt").create(plan)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_run_of_other_settings_is_never_taken_for_ours(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    run = plan.runs[0]
    leave_run(folder, run)
    folder.check(plan)
    config = folder.directory(run).config
    settings = yaml.safe_load(config.read_text())
    settings["runtime"]["microbatch_size"] = 8  # may change, as it may on --resume
    config.write_text(yaml.safe_dump(settings))
    folder.check(plan)
    settings["privacy"]["noise_multiplier"] = 0.5
    config.write_text(yaml.safe_dump(settings))

    with pytest.raises(ConfigError, match=r"run of other settings than .*; move it"):
        folder.create(plan)


def test_a_changed_sweep_file_leaves_earlier_runs_out(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    leave_run(folder, plan.runs[0])
    base = yaml.safe_load(plan.base.read_text())
    base["privacy"]["noise_multiplier"] = 2.0
    plan.base.write_text(yaml.safe_dump(base))
    changed = read_sweep(plan.path)
    folder.create(changed)

    assert folder.state(changed.runs[0]).status == "waiting"
    assert folder.others(changed) == [folder.directory(plan.runs[0]).path]
    assert folder.others(plan) == []
    assert len(list(folder.path.glob("base-*.yaml"))) == 2


def test_tables_belong_where_a_run_of_the_plan_has_begun_or_none_of_any(
    folder: SweepFolder, plan: SweepPlan, tmp_path: Path
) -> None:
    folder.require(plan)
    run, failed, *_ = plan.runs
    leave_run(folder, run)
    folder.require(plan)
    other = replace(plan, runs=plan.runs[1:])
    with pytest.raises(ConfigError, match=r"--sweep-dir=.*: holds runs of other .*; n"):
        folder.require(other)
    folder.errors(failed).touch()
    folder.note_failure(failed, exit_code=2)
    folder.require(other)
    with pytest.raises(ConfigError, match=r"holds runs of other settings only"):
        folder.require(replace(plan, runs=plan.runs[2:]))

    with pytest.raises(ConfigError, match=r"holds no sweep \(sweep\.json is missing\)"):
        SweepFolder(tmp_path / "absent").require(plan)


def test_a_folder_that_cannot_be_entered_is_told(
    folder: SweepFolder, plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "stat", refused)
    tried = {
        "--sweep-dir": [folder.create, folder.require],
        "run": [folder.check, lambda plan: folder.state(plan.runs[0])],
    }

    for field, calls in tried.items():
        told = rf"^{field}=.*: cannot be read \(Permission denied\); give access to it$"
        for call in calls:
            with pytest.raises(UserError, match=told):
                call(plan)


def test_how_far_a_run_has_come_follows_from_its_files(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    finished, unfinished, killed, waiting = plan.runs
    leave_run(folder, finished)
    leave_run(folder, unfinished, is_finished=False)
    leave_run(folder, killed, is_finished=False)
    (checkpoint,) = folder.directory(killed).checkpoints.iterdir()
    checkpoint.unlink()

    assert [folder.state(run).status for run in plan.runs] == [
        "finished",
        "unfinished",
        "waiting",
        "waiting",
    ]
    (shards := checkpoint.with_suffix(".shards")).mkdir()
    assert folder.state(killed).status == "unfinished"
    shards.rmdir()
    with folder.directory(unfinished).locked():
        assert folder.state(unfinished) == RunState("running")
    folder.move_aside(killed)
    folder.move_aside(waiting)
    assert not folder.directory(killed).path.exists()
    assert [path.name for path in (folder.path / "abandoned").iterdir()] == [
        f"{killed.folder}-1"
    ]


def test_a_failure_is_noted_until_it_is_tried_again(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    run, killed, silent, _ = plan.runs
    for one in plan.runs:
        folder.errors(one).touch()
    folder.errors(run).write_text("a warning\nfield=1: rule; remedy\n\n")
    folder.note_failure(run, exit_code=2)
    folder.note_failure(killed, exit_code=-9)
    folder.note_failure(silent, exit_code=7)

    assert folder.state(run) == RunState("failed", "field=1: rule; remedy")
    assert folder.state(killed).error == "killed by signal 9"
    assert folder.state(silent).error == "exit code 7"
    note = folder.path / "failures" / f"{run.folder}.json"
    assert json.loads(note.read_text())["exit_code"] == 2
    note.write_text("[]")
    assert folder.state(run).status == "failed"
    folder.forget_failure(run)
    assert folder.state(run) == RunState("waiting")


def test_two_sweeps_do_not_share_a_folder_but_single_runs_do(
    folder: SweepFolder,
) -> None:
    with (
        folder.locked(is_shared=True),
        folder.locked(is_shared=True),
        pytest.raises(ConfigError, match="another process is sweeping in it"),
        folder.locked(),
    ):
        raise AssertionError("locked twice")
    with folder.locked():
        pass
