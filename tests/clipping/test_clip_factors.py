"""Norms and factors, at the edges of what a float can hold."""

import math

import pytest
import torch

from dpsgd.clipping import clip_factors, per_sample_norms

INF, NAN = math.inf, math.nan


def test_factors_at_every_kind_of_norm() -> None:
    norms = torch.tensor([0.0, 1e-45, 0.5, 2.0, 4.0, 3e38, INF, -INF, NAN])
    factors = clip_factors(norms, 2.0)

    expected = torch.tensor([1, 1, 1, 1, 0.5, 2 / 3e38, 0, 0, 0])
    torch.testing.assert_close(factors, expected)
    assert factors.dtype == torch.float32


def test_a_factor_brings_its_norm_inside_the_ball_and_no_further() -> None:
    norms = torch.logspace(-30, 30, 10_001)
    for clipping_norm in (1e-3, 1.0, 7.7):
        clipped = clip_factors(norms, clipping_norm).double() * norms.double()
        inside = norms <= clipping_norm
        assert clipped.max() <= clipping_norm * (1 + 1e-6)
        assert torch.equal(clipped[inside], norms[inside].double())
        assert (clipped[~inside] >= clipping_norm * (1 - 1e-6)).all()


def test_no_norms_have_no_factors() -> None:
    factors = clip_factors(torch.zeros(0), 1.0)

    assert factors.shape == (0,)
    assert factors.dtype == torch.float32


def test_factors_of_float64_norms_are_float32() -> None:
    assert clip_factors(torch.tensor([4.0]).double(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, INF, NAN])
def test_a_bound_that_is_none_is_refused(clipping_norm: float) -> None:
    with pytest.raises(ValueError, match=r"privacy\.clipping_norm=.*: must be above 0"):
        clip_factors(torch.ones(2), clipping_norm)


def test_norms_are_over_all_leaves_together() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = {
        "a": torch.randn(5, 3, 2, generator=generator),
        "b": torch.randn(5, 7, generator=generator),
    }
    flat = torch.cat([leaf.flatten(1) for leaf in grads.values()], 1).double()

    torch.testing.assert_close(per_sample_norms(grads), flat.norm(dim=1).float())


def test_norms_of_bfloat16_gradients_are_float32() -> None:
    grads = {"a": torch.ones(1, 1_000, dtype=torch.bfloat16)}
    norms = per_sample_norms(grads)

    assert norms.dtype == torch.float32
    assert norms.item() == pytest.approx(math.sqrt(1_000), rel=1e-6)


@pytest.mark.parametrize("bad", [INF, -INF, NAN, 3e38])
def test_a_norm_that_cannot_be_formed_is_not_finite(bad: float) -> None:
    grads = {"a": torch.ones(3, 4), "b": torch.ones(3, 2)}
    grads["a"][1, 2] = bad
    norms = per_sample_norms(grads)

    assert norms.isfinite().tolist() == [True, False, True]


def test_the_norm_of_a_large_leaf_keeps_float32_precision() -> None:
    leaf = torch.full((1, 640 * 640 * 9), 0.1)  # of a WRN-28-10
    exact = 0.1 * math.sqrt(leaf.numel())

    assert per_sample_norms({"a": leaf}).item() == pytest.approx(exact, rel=1e-5)


def test_a_scalar_leaf_has_a_norm() -> None:
    norms = per_sample_norms({"a": torch.tensor([3.0, -4.0])})

    assert norms.tolist() == [3.0, 4.0]
