"""Two GPUs, joined by NCCL, train like one; on the CPU the same tests run with gloo."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_scenarios as scenarios
from rank_processes import Arrays, RankGroup

pytestmark = pytest.mark.distributed

TWO = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))]
)
ONE = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
MODES = pytest.mark.parametrize("mode", ["ddp", "fsdp"])
# Two steps of float32 sums in another order; each GPU picks its fastest convolutions.
ROUNDING = {"cpu": 1e-5, "cuda": 1e-4}
STEPS = 2
BLOCKS = {
    "model.name": "wide_resnet",
    "model.depth": 10,
    "model.width": 1,
    "optimizer.momentum": 0.9,
    "data.augmentation": "crop",
    "data.augmentation_multiplicity": 2,
    "runtime.microbatch_size": 4,
}

Groups = Callable[[int, str], RankGroup]


def trained(
    ranks: Groups, size: int, folder: Path, *, mode: str, device: str
) -> list[Any]:
    """What every rank says of its run; `none` is a process of its own."""
    changes = {**BLOCKS, "runtime.parallel": mode, "runtime.device": device}
    task = (scenarios.trained, folder, changes, STEPS)
    found = ranks(size, device)(
        *((scenarios.by_itself,) if mode == "none" else ()), *task
    )
    assert all(isinstance(one, dict) for one in found), found
    return found


def assert_equal(one: Arrays, two: Arrays) -> None:
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name], err_msg=name)


def assert_close(one: Arrays, two: Arrays, device: str) -> None:
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_allclose(leaf, two[name], atol=ROUNDING[device], err_msg=name)


@TWO
@MODES
def test_two_devices_train_like_one(
    ranks: Groups, tmp_path: Path, device: str, mode: str
) -> None:
    found = trained(ranks, 2, tmp_path / "two", mode=mode, device=device)
    (alone,) = trained(ranks, 1, tmp_path / "one", mode="none", device=device)

    for one in found:
        assert_close(one["state"], alone["state"], device)
        assert_equal(one["state"], found[0]["state"])
        assert one["loss"] == pytest.approx(alone["loss"], abs=ROUNDING[device])
    shares = [one["held"] / alone["held"] for one in found]
    # Leaves with an odd number of rows are not cut in halves.
    expected = [1, 1] if mode == "ddp" else [0.5, 0.5]
    assert shares == pytest.approx(expected, rel=0.05)


@ONE
@MODES
def test_a_group_of_one_trains_like_a_process_alone(
    ranks: Groups, tmp_path: Path, device: str, mode: str
) -> None:
    (found,) = trained(ranks, 1, tmp_path / "group", mode=mode, device=device)
    (alone,) = trained(ranks, 1, tmp_path / "alone", mode="none", device=device)

    assert_close(found["state"], alone["state"], device)
    assert found["held"] == alone["held"]


@TWO
def test_shards_of_two_devices_are_read_by_one_and_by_a_cpu(
    ranks: Groups, tmp_path: Path, device: str
) -> None:
    saved = trained(ranks, 2, tmp_path, mode="fsdp", device=device)[0]["state"]
    assert (tmp_path / f"step-{STEPS:08d}.shards").is_dir()

    for mode, size, where in [
        ("none", 1, device),
        ("fsdp", 1, device),
        ("ddp", 2, device),
        ("none", 1, "cpu"),
    ]:
        changes = {**BLOCKS, "runtime.parallel": mode, "runtime.device": where}
        for one in ranks(size, where)(scenarios.restored, tmp_path, changes):
            assert one["step"] == STEPS
            assert_equal(one["state"], saved)


@TWO
@MODES
def test_two_devices_add_the_very_noise_of_one(
    ranks: Groups, device: str, mode: str
) -> None:
    num_idle = 10_001  # odd: shards begin within a block of draws
    task = (scenarios.noise_alone, "none", num_idle)
    (expected,) = ranks(1, device)(scenarios.by_itself, *task)

    assert float(expected["idle"].std()) == pytest.approx(2.0, rel=0.05)
    for found in ranks(2, device)(scenarios.noise_alone, mode, num_idle):
        assert_equal(found, expected)


@TWO
@MODES
def test_a_device_without_an_example_takes_part(
    ranks: Groups, device: str, mode: str
) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (1, 7))
    options = {"noise_multiplier": 1.0, "sample_rate": 1.0, "num_steps": 2}
    found = ranks(2, device)(scenarios.toy_steps, mode, rows, options)
    task = (scenarios.toy_steps, "none", rows, options)
    (expected,) = ranks(1, device)(scenarios.by_itself, *task)

    for one in found:
        for leaves, wanted in zip(one["steps"], expected["steps"], strict=True):
            assert_close(leaves, wanted, device)
