"""Neighbours: one more example moves the sum by at most the sensitivity."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpsgd.clipping import (
    ClippedGrads,
    clipped_grad,
    clipping_slack,
    per_sample_grads,
)
from dpsgd.models import per_example_loss, trainable_params
from dpsgd.trees import Params, zeros_like

INF, NAN = math.inf, math.nan
PARAMS = {"a": torch.zeros(3), "b": torch.zeros(2)}
COMMON = torch.tensor([[1.0, 2, 3, 4, 5], [0.1, 0, 0, 0.2, 0], [-9, 9, 0, 0, 1]])
SLACK = 1 + 1e-5  # float32 rounding of norm, factor and sum


def linear_loss(params: Params, x: Tensor) -> Tensor:
    """Its gradient is `x`, cut in two leaves."""
    return x[:3] @ params["a"] + x[3:] @ params["b"]


def flat(grads: ClippedGrads) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in grads.clipped_sum.values()])


EXAMPLES = {
    "small": [0.1, 0.2, 0.0, 0.0, 0.1],
    "zero": [0.0] * 5,
    "aligned": [1e4, 2e4, 3e4, 4e4, 5e4],
    "opposed": [-1e4, -2e4, -3e4, -4e4, -5e4],
    "large": [1e18, 0.0, 0.0, -1e18, 1.0],
    "overflowing": [3e38] * 5,
    "infinite": [0.0, INF, 0.0, 0.0, 0.0],
    "minus_infinite": [0.0, 0.0, 0.0, -INF, 0.0],
    "nan": [0.0, 0.0, 0.0, 0.0, NAN],
    "all_nan": [NAN] * 5,
    "denormal": [1e-40, -1e-40, 1e-42, 1e-45, 0.0],
    "underflowing": [1e-25] * 5,
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(
    name: str, bound: float, rescale: bool, microbatch_size: int | None
) -> None:
    engine = clipped_grad(
        linear_loss,
        clipping_norm=bound,
        rescale_to_unit_norm=rescale,
        microbatch_size=microbatch_size,
    )
    example = torch.tensor([EXAMPLES[name]])
    without = engine(PARAMS, COMMON)
    added = engine(PARAMS, torch.cat([COMMON[:1], example, COMMON[1:]]))
    moved = float((flat(added) - flat(without)).norm())

    # Two sums of up to four vectors of length S are subtracted.
    assert moved <= engine.l2_sensitivity * (1 + 2e-6)
    expected = float(example.double().norm())
    if not torch.isfinite(example.norm()):
        expected = 0.0
        assert added.num_nonfinite == 1
    part = min(expected, bound) * engine.l2_sensitivity / bound
    assert moved == pytest.approx(part, rel=1e-5, abs=2e-6 * engine.l2_sensitivity)


def parts(params: Params, grads: Tensor, bound: float) -> Tensor:
    """What each of the gradients, given as rows, adds to a float64 sum."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return params["w"] @ x

    engine = clipped_grad(loss_fn, clipping_norm=bound)
    rows = []
    for row in grads:
        total = zeros_like(params, torch.float64)
        mask = torch.ones(1, dtype=torch.bool)
        engine.accumulate(total, params, row[None], mask=mask)
        rows.append(total["w"])
    return torch.stack(rows)


@pytest.mark.parametrize("size", [1, 5, 1_023, 1_025, 300_000])
@pytest.mark.parametrize("bound", [1e-12, 0.3, 1.0])
def test_rounding_lets_no_gradient_further_past_its_bound_than_is_said(
    size: int, bound: float
) -> None:
    params = {"w": torch.zeros(size)}
    rng = torch.Generator().manual_seed(size)
    grads = torch.stack(
        [
            torch.full((size,), 10 / 3),
            torch.randn(size, generator=rng),
            torch.randn(size, generator=rng).exp(),
            torch.full((size,), 1e-20) + torch.eye(1, size)[0] * bound,
            torch.full((size,), bound / math.sqrt(size)),
        ]
    )
    slack = clipping_slack(params, bound)
    norms = parts(params, grads, bound).norm(dim=1)

    assert 2e-5 < slack < 4e-4
    assert float(norms.max()) <= bound * (1 + slack)
    assert float(norms[0]) > bound * (1 - slack)


def test_what_an_example_adds_does_not_depend_on_the_others(
    tiny_network: Callable[..., nn.Module],
) -> None:
    """In passes of one size, so that a neighbour moves the sum by its own part."""
    model = tiny_network()
    params, rng = trainable_params(model), torch.Generator().manual_seed(2)
    loss_fn, labels = per_example_loss(model), torch.arange(6) % 3
    views = torch.randn(6, 2, 3, 8, 8, generator=rng)
    others = torch.randn(6, 2, 3, 8, 8, generator=rng)
    others[2] = views[4]
    grads, _ = per_sample_grads(loss_fn, params, views, labels)
    moved, _ = per_sample_grads(loss_fn, params, others, labels[[0, 0, 4, 0, 0, 0]])

    for name, leaf in grads.items():
        assert torch.equal(moved[name][2], leaf[4])
        assert not torch.equal(moved[name][4], leaf[4])


def test_a_float64_sum_does_not_depend_on_the_order_of_examples() -> None:
    params = {"w": torch.zeros(50)}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return params["w"] @ x

    engine = clipped_grad(loss_fn, clipping_norm=1.0)
    x = torch.randn(512, 50, generator=torch.Generator().manual_seed(0))
    spread = {}
    for kind in (torch.float32, torch.float64):
        sums = []
        for rows in (x, x.flip(0)):
            total = zeros_like(params, kind)
            for part in rows.split(8):
                mask = torch.ones(8, dtype=torch.bool)
                engine.accumulate(total, params, part, mask=mask)
            sums.append(total["w"].double())
        spread[kind] = float((sums[0] - sums[1]).norm())

    assert spread[torch.float64] < 2 * 512**2 * 2**-53  # what secure noise allows for
    assert spread[torch.float32] > 1e-7  # and float32 would not keep


@pytest.mark.parametrize("rescale", [False, True])
def test_the_sensitivity_is_reached(rescale: bool) -> None:
    engine = clipped_grad(linear_loss, clipping_norm=4.0, rescale_to_unit_norm=rescale)
    moved = float(flat(engine(PARAMS, torch.full((1, 5), 100.0))).norm())

    assert engine.l2_sensitivity == (1.0 if rescale else 4.0)
    assert moved == pytest.approx(engine.l2_sensitivity, rel=1e-6)


def test_a_bound_that_float32_norms_cannot_keep_is_refused() -> None:
    """Norm 2e-23 is taken for 0, and the rescaled gradient has norm 223."""
    with pytest.raises(ValueError, match=r"privacy\.clipping_norm=1e-25"):
        clipped_grad(linear_loss, clipping_norm=1e-25, rescale_to_unit_norm=True)


def test_bad_examples_are_counted_and_leave_the_others() -> None:
    bad = torch.tensor([EXAMPLES["nan"], EXAMPLES["infinite"], EXAMPLES["overflowing"]])
    engine = clipped_grad(linear_loss, clipping_norm=1.0)
    mixed = engine(PARAMS, torch.cat([bad[:2], COMMON, bad[2:]]))

    torch.testing.assert_close(flat(mixed), flat(engine(PARAMS, COMMON)))
    assert mixed.num_nonfinite == 3
    assert mixed.per_sample_norms.isfinite().tolist() == [False] * 2 + [True] * 3 + [
        False
    ]


@pytest.mark.parametrize("bad", [NAN, INF, 1e30, 1.0])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_masked_examples_contribute_nothing_whatever_they_hold(
    bad: float, microbatch_size: int | None
) -> None:
    engine = clipped_grad(
        linear_loss, clipping_norm=1.0, microbatch_size=microbatch_size
    )
    padding = torch.full((2, 5), bad)
    mask = torch.tensor([False, True, True, True, False])
    masked = engine(PARAMS, torch.cat([padding[:1], COMMON, padding[1:]]), mask=mask)
    plain = engine(PARAMS, COMMON)

    torch.testing.assert_close(flat(masked), flat(plain))
    assert masked.num_nonfinite == 0
    assert masked.losses[[0, 4]].tolist() == [0.0, 0.0]
    assert masked.per_sample_norms[[0, 4]].tolist() == [0.0, 0.0]
    assert torch.equal(masked.per_sample_norms[1:4], plain.per_sample_norms)


@pytest.mark.parametrize("microbatch_size", [None, 1, 7])
def test_an_empty_batch_has_the_sum_zero(microbatch_size: int | None) -> None:
    engine = clipped_grad(
        linear_loss, clipping_norm=1.0, microbatch_size=microbatch_size
    )
    result = engine(PARAMS, COMMON[:0])

    assert not flat(result).any()
    assert list(result.clipped_sum) == list(PARAMS)
    assert result.losses.shape == result.per_sample_norms.shape == (0,)
    assert result.num_nonfinite == 0


def test_a_batch_of_padding_has_the_sum_zero() -> None:
    engine = clipped_grad(linear_loss, clipping_norm=1.0)
    result = engine(PARAMS, COMMON, mask=torch.zeros(3, dtype=torch.bool))

    assert not flat(result).any()


def test_no_batch_size_divides_the_sum() -> None:
    engine = clipped_grad(linear_loss, clipping_norm=100.0)
    once = flat(engine(PARAMS, COMMON))

    torch.testing.assert_close(once, COMMON.double().sum(0))
    torch.testing.assert_close(flat(engine(PARAMS, COMMON.repeat(4, 1))), 4 * once)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [0.0, 1e4, 1e30, NAN, INF])
def test_one_image_moves_the_sum_of_a_network_by_at_most_the_sensitivity(
    tiny_network: Callable[..., nn.Module], compute_dtype: str, bad: float
) -> None:
    model = tiny_network(compute_dtype=compute_dtype)
    params = trainable_params(model)
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(5, 2, 3, 8, 8, generator=generator)
    views[2, 1, 0, 3:5] = bad
    labels = torch.tensor([0, 1, 2, 1, 0])
    engine = clipped_grad(
        per_example_loss(model), clipping_norm=0.1, rescale_to_unit_norm=True
    )
    without = torch.tensor([True, True, False, True, True])
    moved = flat(engine(params, views, labels)) - flat(
        engine(params, views, labels, mask=without)
    )

    assert moved.isfinite().all()
    assert float(moved.norm()) <= SLACK
    # A network with group norms has a gradient for every image of numbers.
    assert float(moved.norm()) == pytest.approx(
        1.0 if math.isfinite(bad) and bad < 1e20 else float(moved.norm()), rel=1e-5
    )


@pytest.mark.parametrize("size", [1e39, 1e44, 1e50])
def test_a_float64_gradient_beyond_float32_contributes_zero(size: float) -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return (params["w"] * x).sum()

    params = {"w": torch.zeros(2, dtype=torch.float64)}
    batch = torch.tensor([[size, 0.0], [0.0, 0.5]], dtype=torch.float64)
    grads = clipped_grad(loss_fn, clipping_norm=1.0)(params, batch)

    assert grads.clipped_sum["w"].tolist() == [0.0, 0.5]
    assert int(grads.num_nonfinite) == 1
