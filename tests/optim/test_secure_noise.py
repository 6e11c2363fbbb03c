"""What is released with secure noise: whole numbers on a grid, and nothing finer."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dpsgd.optim import SecureNoise, noisy_grad, secure_noise
from dpsgd.privacy import DPSGDMechanism
from dpsgd.trees import Params

MECHANISM = DPSGDMechanism(
    sample_rate=0.01,
    num_steps=10,
    noise_multiplier=2.5,
    clipping_norm=0.5,
    expected_batch_size=256,
    delta=1e-5,
)
SIZE = 40_000
SLACK = 5e-5


def noise(mechanism: DPSGDMechanism = MECHANISM, **changes: Any) -> SecureNoise:
    facts = {"num_parameters": SIZE, "clipping_slack": SLACK, **changes}
    return SecureNoise.for_sums(mechanism, **facts)


def sums(seed: int = 0, scale: float = 3.0) -> Params:
    rng = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(SIZE, generator=rng, dtype=torch.float64)
    return {"b": values[:100].clone(), "a": values[100:].view(-1, 100).clone()}


def flat(leaves: Params) -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves.values()])


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Makes every draw zero, and keeps how many were asked for, of what size."""
    asked: list[tuple[int, float]] = []

    def zeros(count: int, std: float, *, num_threads: int) -> np.ndarray:
        asked.append((count, std))
        return np.zeros(count)

    monkeypatch.setattr(secure_noise, "rounded_gaussian", zeros)
    return asked


@pytest.mark.parametrize("batch", [1.0, 256.0, 16384.0, 1e6])
@pytest.mark.parametrize("norm", [1e-12, 0.5, 1.0, 1e6])
@pytest.mark.parametrize("size", [1, 2_753_818, 10**9])
def test_the_noise_covers_what_rounding_adds_and_little_more(
    batch: float, norm: float, size: int
) -> None:
    mechanism = dataclasses.replace(
        MECHANISM, clipping_norm=norm, expected_batch_size=batch
    )
    made = noise(mechanism, num_parameters=size)
    most = 4 * batch + 16384
    needed = norm * (1 + SLACK) + 2 * most**2 * 2**-53 * norm
    needed += made.spacing * math.sqrt(size)

    assert needed <= made.sensitivity
    assert made.std * made.spacing >= MECHANISM.noise_multiplier * made.sensitivity
    assert made.std * made.spacing < mechanism.noise_std * (1 + 5e-3)
    if batch < 1e5:
        assert made.std * made.spacing < mechanism.noise_std * (1 + 1e-4)
    assert math.frexp(made.spacing)[0] == 0.5  # a power of two


@pytest.mark.usefixtures("no_noise")
def test_a_neighbour_moves_the_rounded_sum_by_at_most_its_sensitivity() -> None:
    made = noise()
    for seed in range(20):
        part = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        part = part.double() * (0.5 / part.double().norm())
        without = sums(seed)
        values = flat(without) + part
        added = {"b": values[:100].clone(), "a": values[100:].view(-1, 100).clone()}
        made.add_(without)
        made.add_(added)
        assert float((flat(added) - flat(without)).norm()) <= made.sensitivity


@pytest.mark.usefixtures("no_noise")
def test_sums_are_rounded_to_the_nearest_point_of_the_grid() -> None:
    made, total = noise(), sums()
    before = flat(total)
    made.add_(total)
    moved = flat(total) - before

    assert torch.equal(flat(total) / made.spacing, (flat(total) / made.spacing).round())
    assert float(moved.abs().max()) <= made.spacing / 2
    assert float(moved.abs().max()) > 0.49 * made.spacing


def test_what_is_released_lies_on_the_grid_whatever_the_sum() -> None:
    made = noise()
    for scale in (1e-9, 1.0, 1e3):
        total = sums(scale=scale)
        made.add_(total)
        units = flat(total) / made.spacing
        assert torch.equal(units, units.round())
        assert len(units.unique()) > 0.999 * SIZE


def test_zero_has_one_sign_whatever_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        secure_noise, "rounded_gaussian", lambda count, std, **_: -np.zeros(count)
    )
    total = {"a": torch.tensor([-1e-30, 0.0, -0.0, 1e-30], dtype=torch.float64)}
    noise().add_(total)

    assert not torch.signbit(total["a"]).any()


def test_noise_is_gaussian_with_the_standard_deviation_and_new_in_every_leaf() -> None:
    made = noise()
    total = {"a": torch.zeros(20_000).double(), "b": torch.zeros(20_000).double()}
    made.add_(total)
    std = MECHANISM.noise_std
    values = flat(total).numpy()

    assert stats.kstest(values / std, "norm").pvalue > 1e-6
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(values / (factor * std), "norm").pvalue < 1e-100
    correlation = np.corrcoef(total["a"], total["b"])[0, 1]
    assert abs(correlation) < 6 / math.sqrt(20_000)


def test_noise_is_drawn_once_for_all_leaves(no_noise: list[tuple[int, float]]) -> None:
    made = noise()
    made.add_(sums())

    assert no_noise == [(SIZE, made.std)]


def private(total: Params, made: SecureNoise, **changes: Any) -> Params:
    mechanism = dataclasses.replace(MECHANISM, **changes)
    return noisy_grad(
        total, mechanism, l2_sensitivity=0.5, noise_key=1, secure_noise=made
    )


@pytest.mark.usefixtures("no_noise")
def test_the_private_gradient_is_the_noisy_sum_over_the_public_divisor() -> None:
    total = sums()
    expected = {name: (leaf / 256).float() for name, leaf in total.items()}
    grads = private(total, noise())

    assert grads.keys() == total.keys()
    for name, leaf in grads.items():
        assert leaf.dtype == torch.float32
        torch.testing.assert_close(leaf, expected[name], rtol=0, atol=1e-6)


def test_the_noise_of_a_key_is_not_added_as_well() -> None:
    total = {"a": torch.zeros(SIZE, dtype=torch.float64)}
    std = float(private(total, noise())["a"].std()) * 256

    # Two noises would give 1.41 times as much; 40,000 draws have it within 2 %.
    assert std == pytest.approx(MECHANISM.noise_std, rel=0.02)


def test_sums_and_noise_that_do_not_fit_are_refused() -> None:
    total = sums()
    with pytest.raises(ValueError, match=r"a=torch\.float32: secure noise is for sums"):
        noise().add_({"b": total["b"], "a": total["a"].float()})
    with pytest.raises(
        ValueError, match=r"secure_noise=1\.25.*at least 1\.5; make both"
    ):
        private(total, noise(), noise_multiplier=3.0)
    torch.testing.assert_close(flat(total), flat(sums()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="l2_sensitivity=1"):
        noisy_grad(
            total, MECHANISM, l2_sensitivity=1.0, noise_key=1, secure_noise=noise()
        )
