"""Update rules are torch's, go on bit for bit, and follow a public schedule."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dpsgd.config import OptimizerConfig
from dpsgd.optim import Optimizer, learning_rate_at
from dpsgd.trees import Params

NUM_STEPS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "momentum": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"name": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.1},
    "cosine": {"name": "adamw", "schedule": "cosine", "warmup_steps": 3},
}


def config(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 0.5, **settings})


def params() -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "layer.bias": torch.randn(3, generator=generator),
    }


def grads(step: int) -> Params:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(leaf.shape, generator=generator)
        for name, leaf in params().items()
    }


def run(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.step(grads(step), step=step)


def torchs_rule(
    leaves: list[Tensor], settings: OptimizerConfig
) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if settings.name == "adamw":
        return torch.optim.AdamW(
            leaves, lr=0.5, betas=settings.betas, weight_decay=decay, foreach=False
        )
    momentum = settings.momentum
    return torch.optim.SGD(
        leaves, lr=0.5, momentum=momentum, weight_decay=decay, foreach=False
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_torch(name: str) -> None:
    settings, mine, theirs = config(**SETTINGS[name]), params(), params()
    run(Optimizer(mine, settings, num_steps=NUM_STEPS), range(NUM_STEPS))
    rule = torchs_rule(list(theirs.values()), settings)
    for step in range(NUM_STEPS):
        for group in rule.param_groups:
            group["lr"] = learning_rate_at(step, settings, num_steps=NUM_STEPS)
        for leaf_name, grad in grads(step).items():
            theirs[leaf_name].grad = grad
        rule.step()

    for leaf_name, leaf in mine.items():
        torch.testing.assert_close(leaf, theirs[leaf_name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(leaf, params()[leaf_name])


def test_plain_sgd_is_one_line() -> None:
    leaves = params()
    Optimizer(leaves, config(), num_steps=1).step(grads(0), step=0)

    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf, params()[name] - 0.5 * grads(0)[name])
        assert leaf.grad is None


@pytest.mark.parametrize("name", SETTINGS)
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    settings, whole = config(**SETTINGS[name]), params()
    optimizer = Optimizer(whole, settings, num_steps=NUM_STEPS)
    run(optimizer, range(5))
    saved = {key: leaf.clone() for key, leaf in optimizer.state().items()}
    pieces = {key: leaf.clone() for key, leaf in whole.items()}
    run(optimizer, range(5, NUM_STEPS))
    restored = Optimizer(pieces, settings, num_steps=NUM_STEPS)
    restored.load_state(saved)
    run(restored, range(5, NUM_STEPS))

    assert all(torch.equal(whole[key], pieces[key]) for key in whole)
    for key, leaf in optimizer.state().items():
        assert torch.equal(leaf, restored.state()[key])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sgd", set()),
        ("momentum", {"momentum_buffer"}),
        ("adamw", {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_state_is_flat_and_named_by_the_parameters(name: str, kinds: set[str]) -> None:
    optimizer = Optimizer(params(), config(**SETTINGS[name]), num_steps=NUM_STEPS)
    assert optimizer.state() == {}
    run(optimizer, range(2))

    expected = {f"{leaf}.{kind}" for leaf in params() for kind in kinds}
    assert set(optimizer.state()) == expected


def test_learning_rate_is_constant_without_a_schedule() -> None:
    rates = {learning_rate_at(step, config(), num_steps=9) for step in range(9)}

    assert rates == {0.5}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate_warms_up_in_equal_steps_to_the_top(schedule: str) -> None:
    settings = config(schedule=schedule, warmup_steps=4)
    rates = [learning_rate_at(step, settings, num_steps=50) for step in range(5)]

    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_cosine_falls_from_the_top_to_almost_nothing(warmup_steps: int) -> None:
    settings = config(schedule="cosine", warmup_steps=warmup_steps)
    rates = [
        learning_rate_at(step, settings, num_steps=110)
        for step in range(warmup_steps, 110)
    ]

    assert rates[0] == 0.5
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    middle = (110 - warmup_steps) // 2
    assert rates[middle] == pytest.approx(0.25)
    assert 0 < rates[-1] < 0.5 * 1e-3


def test_a_line_falls_in_equal_steps() -> None:
    settings = config(schedule="linear", warmup_steps=2)
    rates = [learning_rate_at(step, settings, num_steps=7) for step in range(2, 7)]

    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_is_constant_until_the_last_steps(schedule: str) -> None:
    settings = config(schedule=schedule, warmup_steps=2, decay_steps=4)
    rates = [learning_rate_at(step, settings, num_steps=20) for step in range(20)]
    short = config(schedule=schedule)
    falling = [learning_rate_at(step, short, num_steps=4) for step in range(4)]

    assert rates[2:16] == [0.5] * 14
    assert rates[16:] == falling


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_of_one_step_has_a_learning_rate(schedule: str) -> None:
    assert learning_rate_at(0, config(schedule=schedule), num_steps=1) == 0.5
