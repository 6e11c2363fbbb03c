import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import NO_MECHANISM, WITHOUT_PRIVACY, result, write_run
from sweep_runs import leave_run

from dpsgd.report.intervals import wilson_interval
from dpsgd.sweep.figure import Point
from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.page import sweep_report
from dpsgd.sweep.plan import SweepPlan, read_sweep
from dpsgd.sweep.results import collect

Sweep = Callable[..., tuple[SweepFolder, SweepPlan]]


@pytest.fixture
def swept(folder: SweepFolder, plan: SweepPlan) -> tuple[SweepFolder, SweepPlan]:
    """Three finished runs, and one that failed."""
    for run, accuracy in zip(plan.runs, (0.5, 0.54, 0.7), strict=False):
        leave_run(folder, run, accuracy=accuracy)
    folder.errors(plan.runs[3]).write_text("a|b: rule; <remedy>")
    folder.note_failure(plan.runs[3], exit_code=2)
    return folder, plan


@pytest.fixture
def sweep_of(tmp_path: Path, sweep_file: Callable[..., Path]) -> Sweep:
    """Makes a sweep all of whose runs are finished."""

    def make(**content: Any) -> tuple[SweepFolder, SweepPlan]:
        plan = read_sweep(sweep_file(**content))
        folder = SweepFolder(tmp_path / "sweep")
        folder.create(plan)
        for run in plan.runs:
            leave_run(
                folder,
                run,
                accuracy=run.index / 100,
                noise_multiplier=run.config.train.num_steps / 2,
            )
        return folder, plan

    return make


def test_runs_of_other_seeds_are_one_setting(
    swept: tuple[SweepFolder, SweepPlan],
) -> None:
    first, second = collect(*swept).groups()

    assert first.values == {"optimizer.learning_rate": 0.5}
    # Averaged weights: 0.2 above the last ones.
    assert first.mean == pytest.approx(0.72)
    assert first.std == pytest.approx(math.sqrt(2) * 0.02)
    assert (second.accuracies, second.std) == (pytest.approx((0.9,)), None)
    assert first.recorded == {
        "noise_multiplier": 1.25,
        "epsilon": 2.9999,
        "epochs": 4 * 16 / 1437,
    }


def test_tables_hold_every_run_with_its_settings_and_failures(
    swept: tuple[SweepFolder, SweepPlan],
) -> None:
    contents = collect(*swept).contents()
    rows = list(csv.DictReader(io.StringIO(contents["results.csv"].decode())))
    summary = list(csv.DictReader(io.StringIO(contents["summary.csv"].decode())))
    facts = json.loads(contents["results.json"])
    text = contents["results.md"].decode()

    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"]
    assert [row["train.seed"] for row in rows] == ["0", "1", "0", "1"]
    assert rows[3]["error"] == "a|b: rule; <remedy>"
    assert rows[3]["test_accuracy"] == ""
    assert [row["runs"] for row in summary] == ["2", "1"]
    assert facts["runs"][0]["test_accuracy_ema"] == pytest.approx(0.7)
    assert facts["summary"][1]["accuracy_std"] is None
    assert "| 0.5 | 72.00 % | 2.83 % | 2 | 1.25 | 2.9999 |" in text
    assert "* learning_rate=1 seed=1: a|b: rule; <remedy>" in text


def test_that_tuning_is_not_covered_stands_with_every_table(
    swept: tuple[SweepFolder, SweepPlan],
) -> None:
    results = collect(*swept)
    note = "which the epsilon of the run that is chosen does not cover"

    for name in ("results.json", "results.md"):
        assert note in results.contents()[name].decode()


def test_seeded_runs_are_said_to_be_no_release(
    swept: tuple[SweepFolder, SweepPlan],
) -> None:
    results = collect(*swept)

    assert results.joint() is None
    assert "may not be released as private" in results.joint_in_words()


def test_what_all_runs_spend_together_is_told(sweep_of: Sweep) -> None:
    results = collect(*sweep_of(grid={"optimizer.learning_rate": [1, 2, 4]}))

    assert results.joint() == pytest.approx((3 * 2.9999, 3e-5))
    assert (
        "(8.9997, 3e-05)-differentially private per example" in results.joint_in_words()
    )
    assert results.joint_in_words().endswith("by basic composition.")
    assert json.loads(results.json())["joint_unit"] == "example"


def test_runs_that_are_no_longer_asked_for_have_been_paid_for(
    sweep_of: Sweep, sweep_file: Callable[..., Path]
) -> None:
    folder, _ = sweep_of(grid={"optimizer.learning_rate": [1, 2, 4]})
    fewer = read_sweep(sweep_file(grid={"optimizer.learning_rate": [1, 8]}))
    results = collect(folder, fewer)

    assert len(results.groups()) == 1
    assert results.joint() == pytest.approx((3 * 2.9999, 3e-5))
    assert "All 3 runs that have begun" in results.joint_in_words()


def test_runs_that_go_on_count_with_what_they_will_spend(
    folder: SweepFolder, sweep_file: Callable[..., Path]
) -> None:
    plan = read_sweep(sweep_file(grid={"optimizer.learning_rate": [1, 2]}))
    leave_run(folder, plan.runs[0], is_finished=False)

    (folder.directory(plan.runs[0]).checkpoints / "step-00000005.safetensors").touch()
    results = collect(folder, plan)

    assert results.joint() == pytest.approx((2.9999, 1e-5))
    assert results.joint_in_words().endswith("composition, once they are finished.")
    assert results.runs_table()[1][0][3] == "5 of 4, evaluated at 4"


def test_one_key_is_a_line_and_the_other_an_axis(sweep_of: Sweep) -> None:
    grid = {
        "privacy.expected_batch_size": [8, 16],
        "optimizer.learning_rate": [2, 1],
        "train.seed": [0, 1],
    }
    results = collect(*sweep_of(grid=grid, x="optimizer.learning_rate"))
    lines = dict(results.lines("optimizer.learning_rate"))

    assert list(lines) == ["expected_batch_size 8", "expected_batch_size 16"]
    assert [point.x for point in lines["expected_batch_size 8"]] == [1, 2]
    deviation = 0.01 / math.sqrt(2)
    assert lines["expected_batch_size 8"][1] == Point(
        x=2.0,
        mean=pytest.approx(0.205),
        low=pytest.approx(0.205 - deviation),
        high=pytest.approx(0.205 + deviation),
    )


def test_error_bars_are_the_deviation_of_seeds_or_the_interval_of_one_run(
    swept: tuple[SweepFolder, SweepPlan],
) -> None:
    folder, plan = swept
    results = collect(folder, plan)
    several, single = results.groups()
    drawn = sweep_report(results).drawn[0].markup

    assert several.interval is None
    assert several.error_bar == pytest.approx((0.72 - 0.0283, 0.72 + 0.0283), abs=1e-4)
    # 180 of 200 test examples: made-up runs have a hundred of two classes each.
    assert single.error_bar == pytest.approx(wilson_interval(0.9, 200))
    assert "Of several seeds the mean, with bars of a standard deviation. " in drawn
    assert "Bars of single runs are 95 % intervals (Wilson) for the finite" in drawn

    (folder.directory(plan.runs[1]).report).unlink()
    both_single = sweep_report(collect(folder, plan)).drawn[0].markup
    assert "deviation" not in both_single
    assert "Bars of single runs" in both_single


def test_a_single_run_whose_test_set_was_not_counted_has_no_error_bar(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    leave_run(folder, plan.runs[0], per_class_num_examples=None)
    results = collect(folder, plan)
    (group,) = results.groups()

    assert group.error_bar == (group.mean, group.mean)
    assert "Bars" not in sweep_report(results).drawn[0].markup


def test_a_recorded_quantity_can_be_the_axis(sweep_of: Sweep) -> None:
    grid = {"privacy.expected_batch_size": [8, 16], "train.num_steps": [2, 8]}
    results = collect(*sweep_of(grid=grid, x=["train.num_steps", "noise_multiplier"]))

    for axis, places in (("train.num_steps", [2, 8]), ("noise_multiplier", [1, 4])):
        lines = dict(results.lines(axis))
        assert list(lines) == ["expected_batch_size 8", "expected_batch_size 16"]
        assert [point.x for point in lines["expected_batch_size 16"]] == places


def test_compute_is_told_in_epochs_along_which_steps_move(sweep_of: Sweep) -> None:
    grid = {"privacy.expected_batch_size": [8, 16], "train.num_steps": [2, 8]}
    folder, plan = sweep_of(grid=grid, x=["epochs", "noise_multiplier"])
    for run, steps in zip(plan.runs, (2, 8, 2, 8), strict=True):
        path = folder.directory(run).report
        size = run.config.privacy.expected_batch_size
        facts = {"expected_batch_size": size, "num_steps": steps}
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    results = collect(folder, plan)

    for axis, places in (
        ("epochs", {8: [16 / 1437, 64 / 1437], 16: [32 / 1437, 128 / 1437]}),
        ("noise_multiplier", {8: [1, 4], 16: [1, 4]}),
    ):
        lines = dict(results.lines(axis))
        assert {
            label: [point.x for point in points] for label, points in lines.items()
        } == {f"expected_batch_size {size}": found for size, found in places.items()}
    assert results.groups()[0].row()["epochs"] == 16 / 1437
    assert [one.name for one in sweep_report(results).drawn][:2] == ["sweep", "sweep-1"]


def test_names_of_entries_stand_for_their_settings(sweep_of: Sweep) -> None:
    entries = [
        {"name": "no average", "ema.decay": None},
        {"name": "+ average", "ema.decay": "0.9"},
    ]
    results = collect(*sweep_of(list=entries, grid={"train.seed": [0, 1]}))
    headings, rows = results.summary_table()

    assert results.lines("entry")[0][0] == ""
    assert [point.x for point in results.lines("entry")[0][1]] == [
        "no average",
        "+ average",
    ]
    assert headings[:2] == ["entry", "accuracy, mean"]
    assert [row[0] for row in rows] == ["no average", "+ average"]
    assert results.runs[0].row()["ema.decay"] is None


def test_what_entries_set_can_be_the_axis_and_null_is_a_place_on_it(
    sweep_of: Sweep,
) -> None:
    entries = [
        {"name": "none", "ema.decay": None, "train.num_steps": 2},
        {"name": "some", "ema.decay": "0.9", "train.num_steps": 3},
    ]
    results = collect(*sweep_of(list=entries, x=["ema.decay", "train.num_steps"]))

    ((_, by_decay),) = results.lines("ema.decay")
    ((_, by_steps),) = results.lines("train.num_steps")
    assert [point.x for point in by_decay] == ["null", 0.9]
    assert [point.x for point in by_steps] == [2, 3]
    assert len(sweep_report(results).drawn) == 4


def test_a_page_of_a_sweep_that_has_not_begun(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    report = sweep_report(collect(folder, plan))

    assert "4 runs: 4 waiting" in report.html
    assert "No run has finished yet." in report.html
    assert report.drawn == []


def test_a_page_shows_summary_runs_and_failures(
    swept: tuple[SweepFolder, SweepPlan],
) -> None:
    report = sweep_report(collect(*swept))

    assert "does not cover" in report.html
    assert "4 runs: 1 failed, 3 finished" in report.html
    assert "rule; &lt;remedy&gt;" in report.html
    assert [one.name for one in report.drawn][:2] == ["sweep", "accuracy"]


def test_runs_without_noise_are_not_averaged_into_a_finite_epsilon(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    leave_run(folder, plan.runs[0], epsilon=None)
    results = collect(folder, plan)

    assert results.groups()[0].recorded["epsilon"] == math.inf
    assert results.lines("epsilon") == []
    assert json.loads(results.json())["summary"][0]["epsilon"] is None


def test_runs_without_privacy_have_no_noise_and_no_guarantee_together(
    folder: SweepFolder, sweep_file: Callable[..., Path]
) -> None:
    private = {"name": "private", "train.num_steps": 3}
    entries = [private, {"name": "without", **WITHOUT_PRIVACY}]
    plan = read_sweep(sweep_file(list=entries))
    leave_run(folder, plan.runs[0])
    leave_run(folder, plan.runs[1], **NO_MECHANISM)
    results = collect(folder, plan)

    assert [row[-2:] for row in results.summary_table()[1]] == [
        ["1.25", "2.9999"],
        ["none", "infinite"],
    ]
    assert "have no privacy guarantee" in results.joint_in_words()


def test_a_seeded_run_does_not_hide_one_without_privacy(
    folder: SweepFolder, sweep_file: Callable[..., Path]
) -> None:
    seeded = {"name": "seeded", "train.seed": 7}
    entries = [seeded, {"name": "without", **WITHOUT_PRIVACY}]
    plan = read_sweep(sweep_file(list=entries))
    leave_run(folder, plan.runs[0])
    leave_run(folder, plan.runs[1], **NO_MECHANISM)
    results = collect(folder, plan)

    assert results.joint() is None
    assert results.joint_in_words() == (
        "Runs are seeded: those may not be released as private. "
        "Together the runs have no privacy guarantee."
    )


def test_a_run_that_was_never_evaluated_has_no_part_in_the_mean(
    folder: SweepFolder, plan: SweepPlan
) -> None:
    path = folder.directory(plan.runs[0]).path
    write_run(path, lines=[], report=result())

    assert collect(folder, plan).groups() == []
