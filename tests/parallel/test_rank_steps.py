"""A step of several ranks is the step of one: same draw, same views, same noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_scenarios as scenarios
from rank_processes import Arrays, RankGroup, alone
from small_runs import write_parquet
from toy_runs import Rows

pytestmark = pytest.mark.distributed

# Float32 sums of some ten gradients of norm 1, in another order.
ROUNDING = 1e-5
MODES = ["ddp", "fsdp"]
Groups = Callable[[int], RankGroup]
NOISY = {
    "noise_multiplier": 1.0,
    "num_steps": 3,
    "expected_batch_size": 6.0,
    "num_views": 2,
    "optimizer__momentum": 0.9,
    "data__augmentation": "flip",
}


def rows_of(num_rows: int) -> Rows:
    """Rows in which the leaf `first` has five elements."""
    return np.random.default_rng(0).uniform(-1, 1, (num_rows, 7))


def assert_close(one: Arrays, two: Arrays) -> None:
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_allclose(leaf, two[name], atol=ROUNDING, err_msg=name)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_ranks_takes_the_steps_of_one(
    ranks: Groups, mode: str, size: int
) -> None:
    rows = rows_of(12)
    (first, *others) = ranks(size)(scenarios.toy_steps, mode, rows, NOISY)
    expected = alone(scenarios.toy_steps, "none", rows, NOISY)

    for found, wanted in zip(first["steps"], expected["steps"], strict=True):
        assert_close(found, wanted)
    for other in others:  # what is gathered is the same to the last bit
        for found, wanted in zip(other["steps"], first["steps"], strict=True):
            assert all((leaf == wanted[name]).all() for name, leaf in found.items())
    # Leaves of 5, 1 and 2 rows leave some ranks without a row.
    held = [sorted(one["held"].items()) for one in (first, *others)]
    parts = {
        ("ddp", 2): [[5, 1, 2], [5, 1, 2]],
        ("ddp", 4): [[5, 1, 2]] * 4,
        ("fsdp", 2): [[3, 1, 1], [2, 0, 1]],
        ("fsdp", 4): [[2, 1, 1], [2, 0, 1], [1, 0, 0], [0, 0, 0]],
    }
    assert [[count for _, count in one] for one in held] == parts[mode, size]


def test_values_without_noise_are_summed_over_ranks(ranks: Groups) -> None:
    rows = rows_of(12)
    (first, second) = ranks(2)(scenarios.toy_steps, "ddp", rows, NOISY)
    expected = alone(scenarios.toy_steps, "none", rows, NOISY)["unprotected"]

    assert first["unprotected"] == second["unprotected"]
    for found, wanted in zip(first["unprotected"], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)  # float32 losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_ranks_without_an_example_take_part(
    ranks: Groups, mode: str, num_rows: int
) -> None:
    options = {**NOISY, "sample_rate": 1.0, "num_steps": 2}
    rows = rows_of(num_rows)
    found = ranks(4)(scenarios.toy_steps, mode, rows, options)
    expected = alone(scenarios.toy_steps, "none", rows, options)

    for one in found:
        assert_close(one["steps"][-1], expected["steps"][-1])


@pytest.mark.parametrize("mode", MODES)
def test_many_ranks_add_the_very_noise_of_one_and_no_more(
    ranks: Groups, mode: str
) -> None:
    num_idle = 100_001  # of no number of ranks a multiple
    expected = alone(scenarios.noise_alone, "none", num_idle)
    std = float(np.concatenate([*expected.values()]).std())

    # 100,000 draws tell 2 from 2 / sqrt(2) and 2 sqrt(2); 5 standard errors.
    assert std == pytest.approx(2.0, rel=5 / np.sqrt(2 * num_idle))
    for size in (2, 4):
        for found in ranks(size)(scenarios.noise_alone, mode, num_idle):
            for name, leaf in expected.items():
                np.testing.assert_array_equal(found[name], leaf)


SMALL = {"model.name": "convnet", "model.depth": 2, "model.groups": 4}
FULL = {
    **SMALL,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.01,
    "data.augmentation": "crop",
    "data.augmentation_multiplicity": 2,
}
CASES = {
    "sgd": FULL,
    "ghost": {**FULL, "runtime.engine": "ghost"},
    "blocks": {"model.name": "wide_resnet", "model.depth": 10, "model.width": 1},
    "adamw": {**SMALL, "optimizer.name": "adamw", "optimizer.learning_rate": 0.01},
    "without_privacy": {
        **SMALL,
        "privacy.enabled": False,
        "privacy.noise_multiplier": None,
        "privacy.delta": None,
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_runs_do_not_depend_on_ranks(
    ranks: Groups, tmp_path: Path, mode: str, case: str
) -> None:
    changes = CASES[case]
    steps = 2
    found = ranks(2)(
        scenarios.trained,
        tmp_path / "two",
        {**changes, "runtime.parallel": mode},
        steps,
    )
    expected = alone(scenarios.trained, tmp_path / "one", changes, steps)

    for one in found:
        assert_close(one["state"], expected["state"])
        assert one["accuracy"] == expected["accuracy"]
        assert one["loss"] == pytest.approx(expected["loss"], abs=ROUNDING)
    whole = expected["held"]
    held = [one["held"] for one in found]
    assert sum(held) == (2 * whole if mode == "ddp" else whole)
    if mode == "fsdp":  # leaves with an odd number of rows are not cut in halves
        assert max(held) == pytest.approx(whole / 2, rel=0.05)


NORM_FREE = {"normalization": "none", "skip_gain_init": 1.0}


@pytest.mark.parametrize(
    ("settings", "num_blocks"),  # the stem of a norm-free network is one
    [
        ({"name": "wide_resnet", "depth": 16, "width": 1}, 3 * 2),
        ({"name": "nf_resnet", "depth": 50, **NORM_FREE}, 1 + 3 + 4 + 6 + 3),
    ],
)
def test_networks_are_sharded_block_by_block(
    ranks: Groups, settings: dict[str, Any], num_blocks: int
) -> None:
    found = ranks(2)(scenarios.num_sharded_modules, settings)

    assert found == [num_blocks + 1] * 2  # and all that is in no block


def test_gathered_parameters_that_stay_are_new_in_the_old_place(ranks: Groups) -> None:
    settings = {"name": "nf_resnet", "depth": 50, **NORM_FREE}
    for one in ranks(2)(scenarios.gathered_in_place, settings):
        first, second = one["found"]
        for name, leaf in one["expected"].items():
            np.testing.assert_array_equal(second[name] * -2, leaf, err_msg=name)
            np.testing.assert_array_equal(first[name] * 4, leaf, err_msg=name)
        before, after = one["places"]
        assert before == after


def test_users_are_shared_like_examples(ranks: Groups, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    owners = [f"user {number}" for number in rng.integers(0, 40, 160)]
    changes = {
        **FULL,
        "data.source": "parquet",
        "data.train": write_parquet(tmp_path / "train.parquet", owner=owners),
        "data.test": write_parquet(tmp_path / "test.parquet", owner=owners[:30]),
        "data.user_column": "owner",
        "data.num_users": 40,
        "privacy.unit": "user",
        "privacy.max_examples_per_user": 3,
        "privacy.delta": 1e-3,
        "runtime.microbatch_size": 4,
    }
    two = {**changes, "runtime.parallel": "ddp"}
    found = ranks(2)(scenarios.trained, tmp_path / "two", two, 2)
    expected = alone(scenarios.trained, tmp_path / "one", changes, 2)

    for one in found:
        assert_close(one["state"], expected["state"])
