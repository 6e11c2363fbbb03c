"""What is released: the sum plus noise of the promised size, over a public divisor."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dpsgd.config import OptimizerConfig
from dpsgd.optim import Optimizer, noisy_descent_, noisy_grad, update_ema_
from dpsgd.privacy import DPSGDMechanism
from dpsgd.rng import RandomStreams
from dpsgd.trees import Params

STREAMS = RandomStreams.from_seed(0)
SHAPES = {"conv": (32, 16, 3, 3), "bias": (100,), "gain": (100,), "head": (50, 301)}
NUM_ELEMENTS = sum(math.prod(shape) for shape in SHAPES.values())


def mechanism(
    *, sigma: float = 1.5, bound: float = 2.0, rescale: bool = False, size: float = 64
) -> DPSGDMechanism:
    return DPSGDMechanism(
        sample_rate=0.01,
        num_steps=10,
        noise_multiplier=sigma,
        clipping_norm=bound,
        expected_batch_size=size,
        delta=1e-5,
        rescale_to_unit_norm=rescale,
    )


def zeros() -> Params:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def flat(grads: Params) -> NDArray[np.float64]:
    leaves = [grads[name].double().flatten() for name in sorted(grads)]
    return torch.cat(leaves).numpy()


def released_noise(plan: DPSGDMechanism, step: int = 0) -> NDArray[np.float64]:
    """The noise on the sum, seen through what an empty draw releases."""
    grads = noisy_grad(
        zeros(),
        plan,
        l2_sensitivity=plan.l2_sensitivity,
        noise_key=STREAMS.noise_key(step),
    )
    return flat(grads) * plan.expected_batch_size


def p_value(noise: NDArray[np.float64], std: float) -> float:
    return float(stats.kstest(noise / std, "norm").pvalue)


def variance_score(noise: NDArray[np.float64], std: float) -> float:
    """Standard score of the variance under the promised one."""
    ratio = float((noise**2).mean()) / std**2
    return (ratio - 1) * math.sqrt(len(noise) / 2)


@pytest.mark.parametrize("sigma", [0.5, 1.5, 20.0])
@pytest.mark.parametrize(
    ("bound", "rescale"), [(2.0, False), (2.0, True), (0.1, False)]
)
def test_noise_has_the_promised_std_and_no_other(
    sigma: float, bound: float, rescale: bool
) -> None:
    plan = mechanism(sigma=sigma, bound=bound, rescale=rescale)
    noise = released_noise(plan)
    std = sigma if rescale else sigma * bound

    assert abs(variance_score(noise, std)) < 4
    assert p_value(noise, std) > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert abs(variance_score(noise, wrong * std)) > 30
        assert p_value(noise, wrong * std) < 1e-12


@pytest.mark.parametrize("leaf", SHAPES)
def test_every_leaf_has_noise_of_the_promised_std(leaf: str) -> None:
    plan = mechanism()
    grads = noisy_grad(
        zeros(),
        plan,
        l2_sensitivity=plan.l2_sensitivity,
        noise_key=STREAMS.noise_key(1),
    )
    noise = grads[leaf].double().flatten().numpy() * plan.expected_batch_size

    assert abs(variance_score(noise, 3.0)) < 4
    assert abs(variance_score(noise, 2.0)) > 4
    assert p_value(noise, 3.0) > 1e-3


@pytest.mark.parametrize("size", [1.0, 64.0, 4096.0, 0.5, 1234.5])
def test_the_expected_batch_size_is_the_only_divisor(size: float) -> None:
    plan = mechanism(sigma=0.0, size=size)
    generator = torch.Generator().manual_seed(0)
    sums = {
        name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
    }
    expected = {name: leaf / size for name, leaf in sums.items()}
    grads = noisy_grad(sums, plan, l2_sensitivity=plan.l2_sensitivity, noise_key=0)

    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_an_empty_draw_gives_pure_noise() -> None:
    noise = released_noise(mechanism())

    assert (noise != 0).all()
    assert abs(noise.mean()) < 4 * 3.0 / math.sqrt(NUM_ELEMENTS)


def test_noise_does_not_depend_on_the_sum() -> None:
    plan = mechanism()
    sums = {name: leaf + 5 for name, leaf in zeros().items()}
    noisy = noisy_grad(
        sums, plan, l2_sensitivity=plan.l2_sensitivity, noise_key=STREAMS.noise_key(0)
    )

    # Sums of size 10 are rounded to 2^-21; three roundings.
    difference = flat(noisy) * plan.expected_batch_size - 5
    np.testing.assert_allclose(difference, released_noise(plan), rtol=0, atol=3e-6)


def test_noise_depends_on_names_and_not_on_the_order_of_leaves() -> None:
    reverse: Params = dict(reversed(zeros().items()))
    first = noisy_grad(
        zeros(), mechanism(), l2_sensitivity=mechanism().l2_sensitivity, noise_key=9
    )
    second = noisy_grad(
        reverse, mechanism(), l2_sensitivity=mechanism().l2_sensitivity, noise_key=9
    )

    assert all(torch.equal(first[name], second[name]) for name in first)


def correlation_score(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Standard score of the correlation of independent samples."""
    return float(np.corrcoef(first, second)[0, 1] * math.sqrt(len(first)))


@pytest.mark.parametrize("step", [1, 2, 1_000])
def test_steps_have_unrelated_noise(step: int) -> None:
    first, second = released_noise(mechanism()), released_noise(mechanism(), step)

    assert abs(correlation_score(first, second)) < 4
    assert correlation_score(first, second + 0.2 * first) > 8
    assert not np.isin(first, second).sum() > 50  # float32 values coincide by chance


def test_leaves_of_the_same_shape_have_unrelated_noise() -> None:
    sums = {name: torch.zeros(20_000) for name in "abc"}
    noise = {
        name: leaf.double().numpy()
        for name, leaf in noisy_grad(
            sums, mechanism(), l2_sensitivity=mechanism().l2_sensitivity, noise_key=5
        ).items()
    }

    for first, second in ("ab", "bc", "ac"):
        assert abs(correlation_score(noise[first], noise[second])) < 4


def test_no_copy_without_noise_outlives_the_step() -> None:
    sums = zeros()
    memory = {name: leaf.data_ptr() for name, leaf in sums.items()}
    grads = noisy_grad(
        sums, mechanism(), l2_sensitivity=mechanism().l2_sensitivity, noise_key=5
    )

    assert {name: leaf.data_ptr() for name, leaf in grads.items()} == memory
    assert all(leaf.all() for leaf in sums.values())


@pytest.mark.parametrize(
    "leaf", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, 2).T], ids=["b", "t"]
)
def test_a_sum_of_another_type_or_layout_is_refused(leaf: Tensor) -> None:
    with pytest.raises(ValueError, match="noise is added to contiguous float32 sums"):
        noisy_grad(
            {"a": leaf},
            mechanism(),
            l2_sensitivity=mechanism().l2_sensitivity,
            noise_key=1,
        )


def test_noise_for_a_sum_of_another_sensitivity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"l2_sensitivity=7\.0: the mechanism's noise"):
        noisy_grad(zeros(), mechanism(), l2_sensitivity=7.0, noise_key=1)


RULES: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "momentum": {"name": "sgd", "momentum": 0.9},
    "decayed": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "scheduled": {"name": "sgd", "schedule": "cosine", "warmup_steps": 2},
    "adamw": {"name": "adamw", "weight_decay": 0.1},
}


def optimizer_of(rule: str, params: Params) -> Optimizer:
    config = OptimizerConfig(**{"learning_rate": 0.5, **RULES[rule]})
    return Optimizer(params, config, num_steps=5)


def sum_of(step: int) -> Params:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
    }


def fused_step(
    plan: DPSGDMechanism,
    optimizer: Optimizer,
    step: int,
    *,
    ema: Params | None = None,
    ema_decay: float | None = None,
    ema_warmup: float = 10.0,
) -> Params:
    total = sum_of(step)
    noisy_descent_(
        total,
        plan,
        optimizer,
        l2_sensitivity=plan.l2_sensitivity,
        noise_key=STREAMS.noise_key(step),
        step=step,
        ema=ema,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
    )
    return total


def separate_step(plan: DPSGDMechanism, optimizer: Optimizer, step: int) -> Params:
    grads = noisy_grad(
        sum_of(step),
        plan,
        l2_sensitivity=plan.l2_sensitivity,
        noise_key=STREAMS.noise_key(step),
    )
    released = {name: leaf.clone() for name, leaf in grads.items()}
    optimizer.step(grads, step=step)
    return released


def assert_equal(first: Params, second: Params) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(leaf, second[name]) for name, leaf in first.items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_one_pass_is_noise_then_step_then_average_bit_for_bit(
    rule: str, ema_decay: float | None
) -> None:
    plan, fused, separate = mechanism(), sum_of(100), sum_of(100)
    averages = [None if ema_decay is None else sum_of(101) for _ in range(2)]
    optimizers = optimizer_of(rule, fused), optimizer_of(rule, separate)
    for step in range(4):
        released = fused_step(
            plan,
            optimizers[0],
            step,
            ema=averages[0],
            ema_decay=ema_decay,
            ema_warmup=3.0,
        )
        assert_equal(released, separate_step(plan, optimizers[1], step))
        if averages[1] is not None and ema_decay is not None:
            update_ema_(averages[1], separate, step=step, decay=ema_decay, warmup=3.0)

        assert_equal(fused, separate)
        assert_equal(averages[0] or {}, averages[1] or {})
        assert_equal(optimizers[0].state(), optimizers[1].state())


@pytest.mark.parametrize("rule", RULES)
def test_steps_of_both_kinds_may_follow_each_other(rule: str) -> None:
    plan, mixed, separate = mechanism(), sum_of(100), sum_of(100)
    optimizers = optimizer_of(rule, mixed), optimizer_of(rule, separate)
    restored = optimizer_of(rule, mixed)
    fused_step(plan, optimizers[0], 0)
    separate_step(plan, optimizers[0], 1)
    restored.load_state(optimizers[0].state())
    fused_step(plan, restored, 2)
    for step in range(3):
        separate_step(plan, optimizers[1], step)

    assert_equal(mixed, separate)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_steps_along_a_sum_of_another_sensitivity(rule: str) -> None:
    params, sums = sum_of(100), sum_of(0)
    with pytest.raises(ValueError, match=r"l2_sensitivity=7\.0: the mechanism's noise"):
        noisy_descent_(
            sums,
            mechanism(),
            optimizer_of(rule, params),
            l2_sensitivity=7.0,
            noise_key=1,
            step=0,
            ema=None,
            ema_decay=None,
        )

    assert_equal(params, sum_of(100))
    assert_equal(sums, sum_of(0))


@pytest.mark.parametrize("odd", ["sum", "average"])
def test_leaves_that_do_not_pair_are_refused(odd: str) -> None:
    params = sum_of(100)
    sums, ema = sum_of(0), sum_of(101)
    wrong = sums if odd == "sum" else ema
    wrong["other"] = wrong.pop("gain")
    with pytest.raises(ValueError, match=r"clipped_sum=\['gain', 'other'\]"):
        noisy_descent_(
            sums,
            mechanism(),
            optimizer_of("momentum", params),
            l2_sensitivity=mechanism().l2_sensitivity,
            noise_key=1,
            step=0,
            ema=ema,
            ema_decay=0.5,
        )

    assert_equal(params, sum_of(100))
