"""The average: its warm-up, its formula, and where it goes."""

import pytest
import torch

from dpsgd.optim import ema_decay_at, update_ema_


@pytest.mark.parametrize(
    ("step", "decay", "expected"),
    [
        (0, 0.9999, 1 / 10),
        (1, 0.9999, 2 / 11),
        (90, 0.9999, 0.91),
        (90, 0.9, 0.9),
        (10**7, 0.9999, 0.9999),
        (0, 0.0, 0.0),
    ],
)
def test_decay_is_warmed_up(step: int, decay: float, expected: float) -> None:
    assert ema_decay_at(step, decay) == pytest.approx(expected, rel=1e-12)


def test_average_follows_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    ema = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    expected = {name: leaf.double() for name, leaf in ema.items()}
    for step in range(50):
        params = {
            name: torch.randn(leaf.shape, generator=generator)
            for name, leaf in ema.items()
        }
        update_ema_(ema, params, step=step, decay=0.8)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, leaf in expected.items():
            leaf.mul_(decay).add_((1 - decay) * params[name].double())

    for name, leaf in expected.items():
        torch.testing.assert_close(ema[name].double(), leaf, rtol=0, atol=1e-6)


def test_a_warm_up_of_2_weighs_all_updates_alike() -> None:
    ema = {"a": torch.tensor([8.0])}
    for step in range(5):
        params = {"a": torch.tensor([float(step)])}
        update_ema_(ema, params, step=step, decay=0.9999, warmup=2.0)

    # Of where it started, 8, and of 0 to 4.
    torch.testing.assert_close(ema["a"], torch.tensor([18 / 6]))


def test_a_longer_warm_up_forgets_faster() -> None:
    decays = [ema_decay_at(99, 0.9999, warmup) for warmup in (2.0, 5.0, 10.0)]

    assert decays == pytest.approx([100 / 101, 100 / 104, 100 / 109])


def test_average_converges_to_constant_parameters() -> None:
    ema, params = {"a": torch.full((2,), 100.0)}, {"a": torch.tensor([1.0, -2.0])}
    for step in range(300):
        update_ema_(ema, params, step=step, decay=0.9)

    torch.testing.assert_close(ema["a"], params["a"])
    assert params["a"].tolist() == [1.0, -2.0]


def test_leaves_are_paired_by_name() -> None:
    ema = {"a": torch.zeros(1), "b": torch.zeros(1)}
    update_ema_(ema, {"b": torch.ones(1) * 2, "a": torch.ones(1)}, step=0, decay=0.0)

    assert (ema["a"].item(), ema["b"].item()) == (1.0, 2.0)
