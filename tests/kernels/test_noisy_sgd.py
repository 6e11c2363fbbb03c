"""The fused step: its formula in float64, its noise, and nothing but its leaves."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dpsgd.kernels.gaussian_noise import add_gaussian_noise_reference_
from dpsgd.kernels.noisy_sgd import (
    SGDStep,
    noisy_sgd_,
    noisy_sgd_reference_,
    noisy_sgd_triton_,
)

Leaves = list[Tensor]
KEY = 0x9D39247E33776D41
# Scalars, an empty leaf, odd sizes, whole programs of 1024 and more than one.
SHAPES: list[tuple[int, ...]] = [(3, 5), (), (1024,), (0,), (2050,), (1,), (7, 3, 3, 2)]
STEP = SGDStep(
    noise_std=3.0,
    noise_key=KEY,
    divisor=17.3,
    learning_rate=0.7,
    weight_decay=0.1,
    ema_weight=0.3,
)


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest) -> Callable[..., None]:
    if request.param == "reference":
        return noisy_sgd_reference_
    pytest.importorskip("triton")
    return noisy_sgd_triton_


def tensors(
    seed: int, device: torch.device, shapes: list[tuple[int, ...]] = SHAPES
) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def whole(leaves: Leaves) -> list[int]:
    return [0] * len(leaves)


def by_the_formula(groups: list[Leaves | None], step: SGDStep) -> list[Leaves | None]:
    """The step in float64, on copies: "Add noise", "Descent", average."""
    copies = [one and [leaf.double() for leaf in one] for one in groups]
    params, sums, momenta, averages = copies
    assert params is not None
    assert sums is not None
    for leaf, (param, total) in enumerate(zip(params, sums, strict=True)):
        noise = torch.zeros_like(param, dtype=torch.float32)
        add_gaussian_noise_reference_(
            noise, std=step.noise_std, key=step.noise_key, leaf=leaf
        )
        total.copy_((total + noise.double()) / step.divisor)
        update = total + step.weight_decay * param
        if momenta is not None:
            update = step.momentum * momenta[leaf] + update
            momenta[leaf].copy_(update)
        param.copy_(param - step.learning_rate * update)
        if averages is not None:
            averages[leaf].copy_(
                (1 - step.ema_weight) * averages[leaf] + step.ema_weight * param
            )
    return copies


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
@pytest.mark.parametrize("ema_weight", [None, 0.3, 0.9, 1.0])
def test_step_follows_the_formula(
    kernel: Callable[..., None],
    kernel_device: torch.device,
    momentum: float | None,
    ema_weight: float | None,
) -> None:
    step = dataclasses.replace(
        STEP, momentum=momentum or 0.0, ema_weight=ema_weight or 0.0
    )
    params, sums = tensors(0, kernel_device), tensors(1, kernel_device)
    momenta = None if momentum is None else tensors(2, kernel_device)
    averages = None if ema_weight is None else tensors(3, kernel_device)
    groups = [params, sums, momenta, averages]
    expected = by_the_formula(groups, step)
    kernel(
        params,
        sums,
        step=step,
        momenta=momenta,
        averages=averages,
        offsets=whole(params),
    )

    for leaves, right in zip(groups, expected, strict=True):
        for leaf, value in zip(leaves or [], right or [], strict=True):
            # Float32 normals are off by 5e-6, times std 3 over 17; then a few
            # roundings of values below 8.
            torch.testing.assert_close(leaf.double(), value, rtol=0, atol=4e-6)


def test_forty_small_leaves_are_told_apart(
    kernel: Callable[..., None], kernel_device: torch.device
) -> None:
    shapes: list[tuple[int, ...]] = [(size % 7,) for size in range(40)]
    params, sums = (tensors(seed, kernel_device, shapes) for seed in (0, 1))
    expected = by_the_formula([params, sums, None, None], STEP)[0]
    kernel(params, sums, step=STEP, momenta=None, averages=None, offsets=whole(params))

    assert expected is not None
    for leaf, value in zip(params, expected, strict=True):
        torch.testing.assert_close(leaf.double(), value, rtol=0, atol=4e-6)


@pytest.mark.parametrize("cut", [1, 2, 4, 1023, 1026, 2049])
def test_parts_of_a_leaf_step_as_the_whole(
    kernel: Callable[..., None], kernel_device: torch.device, cut: int
) -> None:
    """Two shards, each with a leaf before the cut one and one behind it."""
    shapes: list[tuple[int, ...]] = [(3,), (2050,), (5,)]
    together, apart = (
        [tensors(seed, kernel_device, shapes) for seed in range(4)] for _ in range(2)
    )
    step = dataclasses.replace(STEP, momentum=0.9)
    arguments: dict[str, Any] = {"step": step}
    kernel(
        *together[:2],
        **arguments,
        momenta=together[2],
        averages=together[3],
        offsets=[0, 0, 0],
    )
    for part, offsets in (
        (slice(None, cut), [0, 0, 0]),
        (slice(cut, None), [3, cut, 5]),
    ):
        # The other leaves lie in the first shard alone; here they have no elements.
        rest = slice(None) if part.start is None else slice(0, 0)
        shard = [[one[0][rest], one[1][part], one[2][rest]] for one in apart]
        kernel(
            *shard[:2],
            **arguments,
            momenta=shard[2],
            averages=shard[3],
            offsets=offsets,
        )

    for mine, theirs in zip(together, apart, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)


def test_nothing_outside_the_leaves_is_written(
    kernel: Callable[..., None], kernel_device: torch.device
) -> None:
    memory = torch.full((4, 1200), 7.0, device=kernel_device)
    inside = [[row[10:61], row[70:1100]] for row in memory]
    step = dataclasses.replace(STEP, momentum=0.9)
    kernel(
        *inside[:2], step=step, momenta=inside[2], averages=inside[3], offsets=[0, 5]
    )

    for outside in (memory[:, :10], memory[:, 61:70], memory[:, 1100:]):
        assert (outside == 7).all()
    for inner in (memory[:, 10:61], memory[:, 70:1100]):
        assert (inner != 7).all()


def released(
    kernel: Callable[..., None], device: torch.device, std: float, key: int = KEY
) -> NDArray[np.float64]:
    """The noise on two sums, seen through what sums of zero release."""
    params, sums = ([torch.zeros(12_000, device=device) for _ in "ab"] for _ in "ps")
    step = SGDStep(noise_std=std, noise_key=key, divisor=16.0, learning_rate=0.5)
    kernel(params, sums, step=step, momenta=None, averages=None, offsets=[0, 0])
    for param, total in zip(params, sums, strict=True):
        # Nothing but the noisy sum moves the parameters.
        torch.testing.assert_close(param, -0.5 * total)
    return torch.cat(sums).double().cpu().numpy() * 16


def test_noise_has_the_promised_std_and_no_other(
    kernel: Callable[..., None], kernel_device: torch.device
) -> None:
    noise = released(kernel, kernel_device, std=2.5)

    def p_value(std: float) -> float:
        return float(stats.kstest(noise / std, "norm").pvalue)

    def variance_score(std: float) -> float:
        ratio = float((noise**2).mean()) / std**2
        return (ratio - 1) * math.sqrt(len(noise) / 2)

    assert p_value(2.5) > 1e-3
    assert abs(variance_score(2.5)) < 4
    for wrong in (2 / 3, 3 / 2):
        assert p_value(2.5 * wrong) < 1e-12
        assert abs(variance_score(2.5 * wrong)) > 30


def test_leaves_and_keys_have_unrelated_noise_and_the_same_key_the_same(
    kernel: Callable[..., None], kernel_device: torch.device
) -> None:
    noise = released(kernel, kernel_device, std=1.0)
    other = released(kernel, kernel_device, std=1.0, key=KEY ^ (1 << 63))

    def score(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
        """Standard score of the correlation of independent samples."""
        return float(np.corrcoef(first, second)[0, 1] * math.sqrt(len(first)))

    for one, two in ((noise[:12_000], noise[12_000:]), (noise, other)):
        assert abs(score(one, two)) < 4
        assert score(one, two + 0.2 * one) > 8
    again = released(kernel, kernel_device, std=1.0)
    np.testing.assert_array_equal(again, noise)


def test_the_kernel_equals_the_reference_for_every_key_and_place(
    kernel_device: torch.device,
) -> None:
    pytest.importorskip("triton")
    for key, offset in itertools.product((0, 1, 2**63, 2**64 - 1), (0, 2**34 - 2)):
        step = dataclasses.replace(STEP, noise_key=key)
        released = []
        for run in (noisy_sgd_reference_, noisy_sgd_triton_):
            params, sums = ([torch.zeros(9, device=kernel_device)] for _ in "ps")
            run(params, sums, step=step, momenta=None, averages=None, offsets=[offset])
            released += sums
        torch.testing.assert_close(*released, rtol=0, atol=4e-6)


def test_the_key_is_not_shown() -> None:
    assert str(KEY) not in repr(STEP)


def test_no_leaves_are_no_work() -> None:
    noisy_sgd_([], [], step=STEP)
    empty = [torch.zeros(0)]
    noisy_sgd_(empty, [torch.zeros(0)], step=STEP, averages=[torch.zeros(0)])

    assert empty[0].numel() == 0


@pytest.mark.parametrize(
    ("leaf", "rule"),
    [
        (torch.zeros(4, dtype=torch.bfloat16), "contiguous float32"),
        (torch.zeros(4, dtype=torch.float64), "contiguous float32"),
        (torch.zeros(4, 2)[:, 0], "contiguous float32"),
        (torch.zeros(5), r"leaf=<\(5,\) on cpu>: must have its parameters' shape"),
    ],
    ids=["bfloat16", "float64", "strided", "shape"],
)
@pytest.mark.parametrize("place", ["params", "clipped_sums", "momenta", "averages"])
def test_another_type_layout_or_shape_is_refused(
    place: str, leaf: Tensor, rule: str
) -> None:
    names = ("params", "clipped_sums", "momenta", "averages")
    groups = {name: [torch.zeros(4)] for name in names}
    groups[place] = [leaf]
    with pytest.raises(ValueError, match=rule if place != "params" else "leaf="):
        noisy_sgd_(**groups, step=STEP)

    assert not any(one.any() for leaves in groups.values() for one in leaves)


@pytest.mark.parametrize("longer", ["clipped_sums", "momenta", "averages", "offsets"])
def test_lists_of_different_lengths_are_refused(longer: str) -> None:
    groups: dict[str, Any] = {"clipped_sums": [torch.zeros(4)]}
    groups[longer] = [0, 0] if longer == "offsets" else [torch.zeros(4)] * 2
    with pytest.raises(ValueError, match=r"params=<1 leaves>: .* one entry a leaf"):
        noisy_sgd_([torch.zeros(4)], **groups, step=STEP)


def test_momentum_without_momenta_is_refused() -> None:
    step = dataclasses.replace(STEP, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum=0\.9: needs momenta"):
        noisy_sgd_([torch.zeros(4)], [torch.zeros(4)], step=step)


@pytest.mark.gpu
def test_the_public_function_steps_on_a_gpu_as_on_the_cpu() -> None:
    results = []
    for name in ("cpu", "cuda"):
        groups = [tensors(seed, torch.device(name)) for seed in range(4)]
        step = dataclasses.replace(STEP, momentum=0.9)
        noisy_sgd_(*groups[:2], step=step, momenta=groups[2], averages=groups[3])
        results.append([leaf.cpu() for leaves in groups for leaf in leaves])

    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=4e-6)
