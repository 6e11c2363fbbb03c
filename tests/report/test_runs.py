import json
import math
from pathlib import Path

import pytest
from made_up_runs import ENVIRONMENT, PARQUET, PLAN, evaluation, result, write_run

from dpsgd.errors import ConfigError
from dpsgd.report import read_run


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", report=result()))

    assert run.is_finished
    assert (run.step, run.planned_steps) == (4, 4)
    assert (run.epsilon, run.planned_epsilon) == (2.9999, 2.9999)
    assert (run.accuracy, run.accuracy_ema, run.main_accuracy) == (0.5, 0.7, 0.7)
    assert run.number("noise_multiplier") == 1.25
    assert run.epochs == 4 * 16 / 1437
    assert run.versions == {"dpsgd": "0.1.0", "torch": "2.14.1"}
    assert run.text("commit") == "0123abcd"
    assert not run.is_seeded


@pytest.mark.parametrize(
    ("model", "title", "told"),
    [
        ({}, "Net-3", "Net-3"),
        ({}, None, "WRN-10-1"),  # a run of before titles were recorded
        ({"model.name": "convnet"}, None, "convnet"),
    ],
)
def test_a_network_is_called_what_its_run_recorded(
    tmp_path: Path, model: dict[str, str], title: str | None, told: str
) -> None:
    plan = PLAN if title is None else {**PLAN, "network": title}

    assert read_run(write_run(tmp_path / "run", settings=model, plan=plan)).network == (
        told
    )


def test_classes_are_sorted_and_those_without_examples_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", report=result()))

    assert run.by_class is not None
    assert [one.name for one in run.by_class.ranked] == ["cat", "dog"]
    dog = run.by_class.ranked[1]
    assert dog.interval(dog.accuracy) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert run.num_test_examples == 200
    assert run.by_group is None


def test_groups_are_named_by_their_column(tmp_path: Path) -> None:
    report = result(
        per_group_accuracy={"a": 0.25, "b": 0.75, "c": None},
        per_group_num_examples={"a": 4, "b": 8, "c": 0},
    )
    settings = {**PARQUET, "data.group_column": "site"}
    run = read_run(write_run(tmp_path / "run", settings=settings, report=report))

    assert run.by_group is not None
    assert run.by_group.kind == "site"
    assert [(one.name, one.num_right) for one in run.by_group.ranked] == [
        ("b", 6),
        ("a", 1),
    ]


def test_an_unfinished_run_is_read_as_far_as_it_was_evaluated(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", lines=[evaluation(2)]))

    assert not run.is_finished
    assert (run.step, run.planned_steps) == (2, 4)
    assert run.epsilon == evaluation(2)["epsilon"]
    assert run.planned_epsilon == 2.9999
    assert run.by_class is None
    assert run.num_test_examples is None


def test_the_newest_checkpoint_may_be_ahead_of_the_last_evaluation(
    tmp_path: Path,
) -> None:
    others = ["best.safetensors", "step-00000009.part", "step-00000008.safetensors.tmp"]
    names = ["step-00000002.safetensors", "step-00000003.shards", *others]
    run = read_run(
        write_run(tmp_path / "run", lines=[evaluation(2)], checkpoints=names)
    )

    assert (run.step, run.checkpoint_step) == (2, 3)
    only = write_run(tmp_path / "only", lines=[], checkpoints=others)
    assert read_run(only).checkpoint_step is None
    assert read_run(write_run(tmp_path / "none")).checkpoint_step is None


def test_a_run_without_any_evaluation_has_spent_what_is_not_recorded(
    tmp_path: Path,
) -> None:
    run = read_run(write_run(tmp_path / "run", lines=[]))

    assert run.step == 0
    assert run.epsilon is None
    assert run.accuracy is None
    assert run.main_accuracy is None
    assert not run.keeps_average


def test_an_epsilon_of_null_is_infinite_and_a_missing_one_unknown(
    tmp_path: Path,
) -> None:
    noiseless = {"privacy.noise_multiplier": 0}
    folder = write_run(
        tmp_path / "noiseless",
        settings=noiseless,
        report=result(epsilon=None),
        lines=[evaluation(4, epsilon=None)],
    )
    assert read_run(folder).epsilon == math.inf

    old = write_run(tmp_path / "old", settings=noiseless, plan=None, lines=[])
    assert read_run(old).planned_epsilon == math.inf

    older = write_run(tmp_path / "older", plan=None, lines=[])
    assert read_run(older).planned_epsilon is None
    assert read_run(older).epochs is None


def test_a_run_of_before_the_plan_was_written_is_read(tmp_path: Path) -> None:
    settings = {"privacy.target_epsilon": 3, "privacy.noise_multiplier": None}
    report = result()
    del report["per_class_num_examples"]
    del report["format"]
    run = read_run(
        write_run(tmp_path / "run", settings=settings, plan=None, report=report)
    )

    assert run.planned_epsilon == 3
    assert run.planned_steps == 4
    assert run.by_class is None  # shares without counts have no intervals


def test_a_hard_limit_bounds_what_is_planned(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", settings={"privacy.max_epsilon": 1.5}))

    assert run.planned_epsilon == 1.5


def test_values_of_another_kind_are_not_recorded(tmp_path: Path) -> None:
    odd = {
        "step": "2",
        "test_accuracy": 0.5,
    }
    report = result(
        num_steps=True, views_per_second="fast", per_class_accuracy=[1], versions=3
    )
    run = read_run(
        write_run(tmp_path / "run", lines=[odd, evaluation(4)], report=report)
    )

    assert [line.step for line in run.evaluations] == [4]
    assert run.step == 4
    assert run.number("views_per_second") is None
    assert run.by_class is None
    assert run.versions == {"dpsgd": "0.1.0", "torch": "2.14.1"}


def test_unprotected_records_are_counted_and_not_read(tmp_path: Path) -> None:
    unprotected = {"step": 1, "unprotected": {"train_loss": 2.0}}
    run = read_run(write_run(tmp_path / "run", lines=[unprotected, evaluation(2)]))

    assert run.num_unprotected == 1
    assert [line.step for line in run.evaluations] == [2]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match=r"plan\.json cannot be read \(.*\); mend"):
        read_run(folder)
    (folder / "plan.json").unlink()
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        read_run(folder)
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path)


def test_a_run_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", plan={**PLAN, "format": 99})

    with pytest.raises(ConfigError, match=r"has format 99, .*; update dpsgd"):
        read_run(folder)


def test_a_file_that_holds_something_else_is_as_if_it_was_empty(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps([ENVIRONMENT]))

    assert read_run(folder).versions == {}
