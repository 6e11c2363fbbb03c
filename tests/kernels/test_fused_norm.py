"""Norms of a sum against plain torch in float64: all uses of outputs and parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_network import Params, assert_near, plain_norm
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import sum_relu_group_norm

M, K, C = 3, 2, 16
PARAMS = ("bias", "more_bias", "scale", "shift", "more_scale", "more_shift")
SETTINGS = {"num_groups": 4, "eps": 1e-5}
Norm = Callable[..., tuple[tuple[Tensor, ...], Tensor | None]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(device: torch.device) -> Params:
    return {name: draw(C, seed=n).to(device) for n, name in enumerate(PARAMS)}


def images(device: torch.device, *, seed: int) -> Tensor:
    return draw(M, K, C, 4, 3, seed=seed).to(device)


# So that each element of each output has another gradient.
WEIGHTS = dict(zip(("first", "second", "total"), draw(3, K, C, 4, 3), strict=True))


def loss_of(
    norm: Norm,
    *,
    num_biases: int = 2,
    num_outputs: int = 2,
    uses: tuple[str, ...] = ("first", "second", "total"),
) -> Callable[..., Tensor]:
    """Returns a loss of parameters, images (K, C, H, W) and a residual or None."""

    def loss(p: Params, x: Tensor, residual: Tensor | None) -> Tensor:
        biases = (p["bias"], p["more_bias"])[:num_biases]
        pairs = ((p["scale"], p["shift"]), (p["more_scale"], p["more_shift"]))
        outputs, total = norm(x, biases, residual, pairs[:num_outputs], **SETTINGS)
        named = {"first": outputs[0], "second": outputs[-1], "total": total}
        parts = [
            (named[use] * WEIGHTS[use].to(x.device, x.dtype)).sum()
            for use in uses
            if named[use] is not None
        ]
        return torch.stack(parts).sum()

    return loss


def expected_grads(
    options: dict[str, Any], params: Params, x: Tensor, residual: Tensor | None
) -> Params:
    """Gradients of parameters, images and residual (M, ...), one example at a time."""
    loss = loss_of(plain_norm, **options)
    rows = []
    for m in range(M):
        leaves = {name: leaf.cpu().double() for name, leaf in params.items()}
        leaves["x"] = x[m].cpu().double()
        if residual is not None:
            leaves["residual"] = residual[m].cpu().double()
        for leaf in leaves.values():
            leaf.requires_grad_()
        value = loss(leaves, leaves["x"], leaves.get("residual"))
        found = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        rows.append(dict(zip(leaves, found, strict=True)))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def per_sample_grads(
    options: dict[str, Any], params: Params, x: Tensor, residual: Tensor | None
) -> Params:
    """The same by the operator, under vmap."""
    loss = loss_of(sum_relu_group_norm, **options)
    if residual is None:
        run = vmap(grad(lambda p, x: loss(p, x, None), (0, 1)), (None, 0))
        grads, grad_x = run(params, x)
        return {**grads, "x": grad_x}
    run = vmap(grad(loss, (0, 1, 2)), (None, 0, 0))
    grads, grad_x, grad_residual = run(params, x, residual)
    return {**grads, "x": grad_x, "residual": grad_residual}


@pytest.fixture(params=["references", "kernels"])
def implementation(
    request: pytest.FixtureRequest, on_kernels: Callable[[], None]
) -> str:
    """Whether kernels run: on a GPU they always do."""
    if request.param == "kernels":
        on_kernels()
    return str(request.param)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.usefixtures("implementation")
def test_per_sample_gradients_equal_those_of_plain_torch(
    num_outputs: int, num_biases: int, has_residual: bool, kernel_device: torch.device
) -> None:
    options = {"num_outputs": num_outputs, "num_biases": num_biases}
    params, x = parameters(kernel_device), images(kernel_device, seed=7)
    residual = images(kernel_device, seed=8) if has_residual else None

    assert_near(
        per_sample_grads(options, params, x, residual),
        expected_grads(options, params, x, residual),
    )


@pytest.mark.parametrize("uses", [("first",), ("second",), ("total",)], ids="".join)
@pytest.mark.usefixtures("implementation")
def test_outputs_that_nothing_reads_have_no_gradient(
    uses: tuple[str], kernel_device: torch.device
) -> None:
    options = {"uses": uses}
    params, x = parameters(kernel_device), images(kernel_device, seed=7)
    residual = images(kernel_device, seed=8)

    assert_near(
        per_sample_grads(options, params, x, residual),
        expected_grads(options, params, x, residual),
    )


@pytest.mark.parametrize(
    ("x_dim", "residual_dim"), [(None, 0), (0, None), (None, None)]
)
@pytest.mark.usefixtures("implementation")
def test_examples_may_share_images_or_residual(
    x_dim: int | None, residual_dim: int | None, kernel_device: torch.device
) -> None:
    params = parameters(kernel_device)
    x, residual = images(kernel_device, seed=7), images(kernel_device, seed=8)
    loss = loss_of(sum_relu_group_norm)
    factors = torch.tensor([1.0, 2.0, 3.0], device=kernel_device)

    def scaled(p: Params, x: Tensor, residual: Tensor, factor: Tensor) -> Tensor:
        return factor * loss(p, x, residual)

    found = vmap(grad(scaled), (None, x_dim, residual_dim, 0))(
        params,
        x[0] if x_dim is None else x,
        residual[0] if residual_dim is None else residual,
        factors,
    )
    x = x[:1].expand_as(x) if x_dim is None else x
    residual = residual[:1].expand_as(x) if residual_dim is None else residual
    expected = expected_grads({}, params, x, residual)
    of_factors = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None]

    assert_near(found, {name: expected[name] * of_factors for name in params})


@pytest.mark.usefixtures("implementation")
def test_values_are_those_of_plain_torch(kernel_device: torch.device) -> None:
    p, x = parameters(kernel_device), images(kernel_device, seed=7)[0]
    residual = images(kernel_device, seed=8)[0]
    pairs = ((p["scale"], p["shift"]), (p["more_scale"], p["more_shift"]))
    outputs, total = sum_relu_group_norm(
        x, (p["bias"], p["more_bias"]), residual, pairs, **SETTINGS
    )
    p, x, residual = (
        {name: leaf.cpu().double() for name, leaf in p.items()},
        x.cpu().double(),
        residual.cpu().double(),
    )
    pairs = ((p["scale"], p["shift"]), (p["more_scale"], p["more_shift"]))
    expected, expected_total = plain_norm(
        x, (p["bias"], p["more_bias"]), residual, pairs, **SETTINGS
    )

    for found, wanted in zip(
        (*outputs, total), (*expected, expected_total), strict=True
    ):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("implementation")
def test_a_sum_without_residual_is_not_returned(kernel_device: torch.device) -> None:
    p, x = parameters(kernel_device), images(kernel_device, seed=7)[0]
    affine = (p["scale"], p["shift"])
    outputs, total = sum_relu_group_norm(x, (p["bias"],), None, (affine,), **SETTINGS)

    assert len(outputs) == 1
    assert total is None


@pytest.mark.usefixtures("implementation")
def test_frozen_parameters_get_no_gradient(kernel_device: torch.device) -> None:
    p, x = parameters(kernel_device), images(kernel_device, seed=7)
    trained = ("more_bias", "shift", "more_scale")
    expected = expected_grads({}, p, x, x)
    for name in trained:
        p[name].requires_grad_()
    loss_of(sum_relu_group_norm)(p, x[0], x[0]).backward()
    found = {name: leaf.grad for name, leaf in p.items() if leaf.grad is not None}

    assert_near(found, {name: expected[name][0] for name in trained})


def test_channels_that_are_no_power_of_two_take_the_reference(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    on_kernels()
    x, scale, shift = (one.to(kernel_device) for one in draw(3, 2, 12, 3, 3))
    affine = (scale[0, :, 0, 0], shift[0, :, 0, 0])
    (y,), _ = sum_relu_group_norm(x, (), None, (affine,), **SETTINGS)
    wide = tuple(one.cpu().double() for one in affine)
    (expected,), _ = plain_norm(x.cpu().double(), (), None, (wide,), **SETTINGS)

    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64_where_kernels_run(
    on_kernels: Callable[[], None],
) -> None:
    params = {
        name: leaf.double() for name, leaf in parameters(torch.device("cpu")).items()
    }
    x = images(torch.device("cpu"), seed=7).double()
    expected = expected_grads({}, params, x, x)
    on_kernels()  # which compute in float32
    found = per_sample_grads({}, params, x, x)

    for name, wanted in expected.items():
        # A few hundred roundings of 1e-16 each, of terms up to 10.
        torch.testing.assert_close(found[name], wanted, rtol=1e-11, atol=1e-11)


def test_mapping_over_parameters_is_refused_by_name(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    on_kernels()
    params = parameters(kernel_device)
    many = {**params, "more_shift": torch.stack([params["more_shift"]] * M)}
    in_dims = {name: 0 if name == "more_shift" else None for name in params}
    x = images(kernel_device, seed=7)

    with pytest.raises(ValueError, match="images, not over parameters"):
        vmap(loss_of(sum_relu_group_norm), (in_dims, 0, 0))(many, x, x)
