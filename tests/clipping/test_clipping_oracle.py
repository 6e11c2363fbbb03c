"""The engine against the explicit loop: one example at a time, clip, add."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dpsgd.clipping import (
    PassStatistics,
    clipped_grad,
    per_sample_grads,
    per_sample_norms,
)
from dpsgd.models import per_example_loss, trainable_params
from dpsgd.trees import Params

M, K, SHAPE = 6, 2, (3, 8, 8)
Network = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]


def batch(dtype: torch.dtype = torch.float32, num_views: int = K) -> Batch:
    generator = torch.Generator().manual_seed(5)
    views = torch.randn(M, num_views, *SHAPE, generator=generator, dtype=dtype)
    return views, torch.randint(3, (M,), generator=generator)


def gradient(
    model: nn.Module, params: Params, views: Tensor, label: Tensor
) -> dict[str, Tensor]:
    """One example's gradient by torch.autograd; the loss is the mean over views."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    losses = [
        F.cross_entropy(functional_call(model, leaves, (view[None],)), label[None])
        for view in views
    ]
    loss = sum(losses, start=torch.zeros(())) / len(losses)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def norm(grads: Params) -> float:
    return sum(float(leaf.double().square().sum()) for leaf in grads.values()) ** 0.5


def distance(first: Params, second: Params) -> float:
    """L2 distance over all leaves, relative to the second."""
    difference = {name: first[name].double() - second[name] for name in second}
    return norm(difference) / norm(second)


def looped_sum(
    model: nn.Module, params: Params, views: Tensor, labels: Tensor, bound: float
) -> tuple[Params, list[float]]:
    total = {name: torch.zeros_like(leaf).double() for name, leaf in params.items()}
    norms = []
    for example in zip(views, labels, strict=True):
        grads = gradient(model, params, *example)
        norms.append(norm(grads))
        for name, leaf in grads.items():
            total[name] += leaf.double() * min(1.0, bound / norms[-1])
    return total, norms


def median_norm(model: nn.Module, views: Tensor, labels: Tensor) -> float:
    grads, _ = per_sample_grads(
        per_example_loss(model), trainable_params(model), views, labels
    )
    return float(per_sample_norms(grads).median())


def test_engine_equals_the_loop(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch()
    params, loss_fn = trainable_params(model), per_example_loss(model)
    bound = median_norm(model, views, labels)
    expected, norms = looped_sum(model, params, views, labels, bound)
    assert min(norms) < bound < max(norms)  # some are clipped, some are not
    result = clipped_grad(loss_fn, clipping_norm=bound)(params, views, labels)

    assert distance(result.clipped_sum, expected) < 1e-5
    torch.testing.assert_close(
        result.per_sample_norms, torch.tensor(norms), rtol=1e-5, atol=0
    )
    losses = [loss_fn(params, *example) for example in zip(views, labels, strict=True)]
    torch.testing.assert_close(result.losses, torch.stack(losses))
    assert result.num_nonfinite == 0


def test_rescaled_sum_is_the_sum_over_the_bound(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch()
    params, loss_fn = trainable_params(model), per_example_loss(model)
    bound = median_norm(model, views, labels)
    expected, _ = looped_sum(model, params, views, labels, bound)
    engine = clipped_grad(loss_fn, clipping_norm=bound, rescale_to_unit_norm=True)
    scaled = engine(params, views, labels).clipped_sum

    assert engine.l2_sensitivity == 1.0
    assert (
        distance(scaled, {name: leaf / bound for name, leaf in expected.items()}) < 1e-5
    )
    assert clipped_grad(loss_fn, clipping_norm=bound).l2_sensitivity == bound


def test_float64_gradients_equal_the_loop_to_float64_precision(
    tiny_network: Network,
) -> None:
    model = tiny_network(compute_dtype="float64").double()
    views, labels = batch(torch.float64)
    params = trainable_params(model)
    grads, _ = per_sample_grads(per_example_loss(model), params, views, labels)
    norms = per_sample_norms(grads)

    assert norms.dtype == torch.float64
    for row, example in enumerate(zip(views, labels, strict=True)):
        expected = gradient(model, params, *example)
        mine = {name: leaf[row] for name, leaf in grads.items()}
        assert distance(mine, expected) < 1e-12
        assert abs(float(norms[row]) / norm(expected) - 1) < 1e-12


def test_views_are_averaged_before_clipping() -> None:
    """Two views with opposite gradients of norm 10: together 1, clipped apart 0.2."""

    def loss_fn(params: Params, views: Tensor) -> Tensor:
        return (views @ params["w"]).mean()

    views = torch.tensor([[[10.0, 1.0], [-10.0, 1.0]]])  # (M, K, P)
    result = clipped_grad(loss_fn, clipping_norm=1.0)({"w": torch.zeros(2)}, views)
    apart = clipped_grad(loss_fn, clipping_norm=1.0)(
        {"w": torch.zeros(2)}, views[0, :, None]
    )

    assert result.clipped_sum["w"].tolist() == [0.0, 1.0]
    assert result.per_sample_norms.tolist() == [1.0]
    assert apart.clipped_sum["w"][1] / 2 < 0.1


def test_more_copies_of_a_view_change_nothing(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch(num_views=1)
    engine = clipped_grad(per_example_loss(model), clipping_norm=0.5)
    params = trainable_params(model)
    once = engine(params, views, labels)
    thrice = engine(params, views.expand(M, 3, *SHAPE).contiguous(), labels)

    assert distance(thrice.clipped_sum, once.clipped_sum) < 1e-5


@pytest.mark.parametrize("microbatch_size", [1, 2, 4, 6, 100])
def test_microbatch_size_changes_nothing_but_rounding(
    tiny_network: Network, microbatch_size: int
) -> None:
    model, (views, labels) = tiny_network(), batch()
    params, loss_fn = trainable_params(model), per_example_loss(model)
    mask = torch.tensor([True, True, False, True, True, True])
    whole = clipped_grad(loss_fn, clipping_norm=1.0)
    parts = clipped_grad(loss_fn, clipping_norm=1.0, microbatch_size=microbatch_size)
    expected = whole(params, views, labels, mask=mask)
    result = parts(params, views, labels, mask=mask)

    assert distance(result.clipped_sum, expected.clipped_sum) < 1e-5
    torch.testing.assert_close(result.per_sample_norms, expected.per_sample_norms)
    torch.testing.assert_close(result.losses, expected.losses)
    assert result.losses.shape == (M,)


@pytest.mark.parametrize(("size", "passes"), [(None, [6]), (4, [4, 4]), (1, [1] * 6)])
def test_no_pass_takes_more_than_a_microbatch(
    monkeypatch: pytest.MonkeyPatch, size: int | None, passes: list[int]
) -> None:
    engine = clipped_grad(linear_loss, clipping_norm=1.0, microbatch_size=size)
    seen, accumulate = list[int](), engine.accumulate

    def watched(*args: Any, mask: Tensor) -> PassStatistics:
        seen.append(len(mask))
        return accumulate(*args, mask=mask)

    monkeypatch.setattr(engine, "accumulate", watched)
    engine({"w": torch.ones(1, 1)}, torch.ones(M, 1), torch.zeros(M, 1))

    assert seen == passes


def test_order_of_the_batch_changes_nothing_but_rounding(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch()
    engine = clipped_grad(per_example_loss(model), clipping_norm=1.0, microbatch_size=4)
    params = trainable_params(model)
    result = engine(params, views, labels)
    turned = engine(params, views.flip(0), labels.flip(0))

    assert distance(turned.clipped_sum, result.clipped_sum) < 1e-5


def test_one_example_is_its_clipped_gradient(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch()
    params, loss_fn = trainable_params(model), per_example_loss(model)
    result = clipped_grad(loss_fn, clipping_norm=0.25)(params, views[:1], labels[:1])
    expected = gradient(model, params, views[0], labels[0])
    scale = 0.25 / norm(expected)

    assert scale < 1
    assert norm(result.clipped_sum) == pytest.approx(0.25, rel=1e-5)
    scaled = {name: leaf * scale for name, leaf in expected.items()}
    assert distance(result.clipped_sum, scaled) < 1e-5


def test_accumulate_adds_to_what_is_there(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch()
    params = trainable_params(model)
    engine = clipped_grad(per_example_loss(model), clipping_norm=1.0)
    alone = engine(params, views, labels).clipped_sum
    total = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    mask = torch.tensor([True] * 5 + [False])
    seen = engine.accumulate(total, params, views, labels, mask=torch.ones(M) > 0)
    padded = engine.accumulate(total, params, views, labels, mask=mask)
    last = engine(params, views[5:], labels[5:]).clipped_sum

    expected = {name: 1 + 2 * leaf - last[name] for name, leaf in alone.items()}
    assert distance(total, expected) < 1e-6
    assert (int(seen.num_examples), int(padded.num_examples)) == (6, 5)
    assert padded.per_sample_norms[5] == padded.losses[5] == 0


def test_parameters_are_left_alone(tiny_network: Network) -> None:
    model, (views, labels) = tiny_network(), batch()
    params = trainable_params(model)
    before = {name: leaf.clone() for name, leaf in params.items()}
    clipped_grad(per_example_loss(model), clipping_norm=1.0)(params, views, labels)

    assert all(torch.equal(params[name], before[name]) for name in params)
    assert all(leaf.grad is None for leaf in model.parameters())


class Shared(nn.Module):
    """One weight used as input and output layer, another used twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.first = nn.Linear(4, 3, bias=False)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(torch.tanh(self.inner(self.inner(x.flatten(1)))))
        return self.tied(torch.tanh(hidden @ self.first.weight))


class Grouped(nn.Module):
    """Grouped, strided and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=4, padding=1, stride=2)
        self.dilated = nn.Conv2d(8, 3, 3, dilation=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dilated(torch.tanh(self.grouped(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("build", "shape"), [(Shared, (1, 2, 2)), (Grouped, (4, 8, 8))]
)
def test_shared_and_grouped_parameters_are_exact(
    build: Callable[[], nn.Module], shape: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    model = build()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.normal_(generator=generator)
    views = torch.randn(M, K, *shape, generator=generator)
    labels = torch.randint(3, (M,), generator=generator)
    params, bound = trainable_params(model), median_norm(model, views, labels)
    expected, norms = looped_sum(model, params, views, labels, bound)
    engine = clipped_grad(per_example_loss(model), clipping_norm=bound)
    result = engine(params, views, labels)

    assert distance(result.clipped_sum, expected) < 1e-5
    torch.testing.assert_close(
        result.per_sample_norms, torch.tensor(norms), rtol=1e-5, atol=0
    )


def test_bfloat16_compute_has_float32_norms_and_sums(tiny_network: Network) -> None:
    model = tiny_network(compute_dtype="bfloat16")
    views, labels = batch(torch.bfloat16)
    params = trainable_params(model)
    grads, _ = per_sample_grads(per_example_loss(model), params, views, labels)
    exact = sum(leaf.double().square().flatten(1).sum(1) for leaf in grads.values())
    engine = clipped_grad(per_example_loss(model), clipping_norm=0.5)
    result = engine(params, views, labels)
    one = engine(params, views[:1], labels[:1]).clipped_sum

    # The norm is that of the float32 gradients, whatever type computed them.
    torch.testing.assert_close(
        result.per_sample_norms.double(), exact.sqrt(), rtol=1e-5, atol=0
    )
    assert {leaf.dtype for leaf in result.clipped_sum.values()} == {torch.float32}
    assert result.losses.dtype == torch.float32
    assert norm(one) == pytest.approx(0.5, rel=1e-5)


def linear_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return (params["w"] @ x - y).square().sum()


@pytest.mark.slow
def test_compiled_engine_equals_the_eager_one() -> None:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 4, generator=generator)}
    x, y = torch.randn(5, 4, generator=generator), torch.ones(5, 3)
    x[3] = float("nan")
    bound = {"clipping_norm": 1.0, "microbatch_size": 2}
    eager = clipped_grad(linear_loss, **bound)(params, x, y)
    compiled = clipped_grad(linear_loss, execution="compile", **bound)(params, x, y)

    torch.testing.assert_close(compiled.clipped_sum, eager.clipped_sum)
    torch.testing.assert_close(
        compiled.per_sample_norms, eager.per_sample_norms, equal_nan=True
    )
    assert compiled.num_nonfinite == 1


@pytest.mark.parametrize(("size", "shown"), [(0, "0"), (-3, "-3")])
def test_a_microbatch_of_nothing_is_refused(size: int, shown: str) -> None:
    with pytest.raises(ValueError, match=f"runtime.microbatch_size={shown}: must be"):
        clipped_grad(linear_loss, clipping_norm=1.0, microbatch_size=size)


def test_tensors_of_different_lengths_are_refused() -> None:
    engine: Callable[..., object] = clipped_grad(linear_loss, clipping_norm=1.0)

    with pytest.raises(ValueError, match=r"batch=\[2, 3\]: tensors must share"):
        engine({"w": torch.ones(1, 1)}, torch.ones(2, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match="batch=nothing"):
        engine({"w": torch.ones(1, 1)})


def test_a_mask_of_another_length_is_refused() -> None:
    engine = clipped_grad(linear_loss, clipping_norm=1.0)
    params, mask = {"w": torch.ones(1, 1)}, torch.zeros(1, dtype=torch.bool)

    with pytest.raises(ValueError, match="tensors must share"):
        engine(params, torch.ones(3, 1), torch.zeros(3, 1), mask=mask)
