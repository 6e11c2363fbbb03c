"""All uses of a weight gradient against autograd in float64, example by example."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conv_cases import BOTH_WAYS, SHAPES, Shape, assert_near, case, moments_of
from torch import Tensor

from dpsgd.kernels import ConvGeometry
from dpsgd.kernels import conv_weight_grad_triton as launching
from dpsgd.kernels.conv_weight_grad import (
    conv_weight_grad,
    conv_weight_grad_moments,
    conv_weight_grad_moments_reference,
    conv_weight_grad_moments_triton,
    conv_weight_grad_reference,
    conv_weight_grad_sum,
    conv_weight_grad_sum_reference,
    conv_weight_grad_sum_triton,
    conv_weight_grad_triton,
)


class Runs(NamedTuple):
    grad: Callable[..., Tensor]
    moments: Callable[..., Tensor]
    total: Callable[..., Tensor]


REFERENCES = Runs(
    conv_weight_grad_reference,
    conv_weight_grad_moments_reference,
    conv_weight_grad_sum_reference,
)
KERNELS = Runs(
    conv_weight_grad_triton,
    conv_weight_grad_moments_triton,
    conv_weight_grad_sum_triton,
)


@pytest.fixture(params=["reference", "triton"])
def runs(request: pytest.FixtureRequest) -> Runs:
    if request.param == "reference":
        return REFERENCES
    pytest.importorskip("triton")
    return KERNELS


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_of_each_example_is_that_of_autograd(
    name: str, runs: Runs, kernel_device: torch.device
) -> None:
    x, grad_y, geometry, expected = case(SHAPES[name], kernel_device)
    found = runs.grad(x, grad_y, geometry)

    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert_near(found, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_moments_are_sums_over_each_output_channel(
    name: str, runs: Runs, kernel_device: torch.device
) -> None:
    x, grad_y, geometry, grads = case(SHAPES[name], kernel_device)
    direction = torch.randn(grads.shape[1:])
    found = runs.moments(x, grad_y, direction.to(kernel_device), geometry)
    expected = moments_of(grads, direction.double())

    for moment, wanted in zip(found, expected, strict=True):
        assert_near(moment, wanted)


@pytest.mark.parametrize("name", SHAPES)
def test_the_sum_is_that_of_factors_times_gradients(
    name: str, runs: Runs, kernel_device: torch.device
) -> None:
    x, grad_y, geometry, grads = case(SHAPES[name], kernel_device)
    factors = torch.rand(len(x))
    found = runs.total(x, grad_y, factors.to(kernel_device), geometry)

    assert_near(found, torch.einsum("m...,m->...", grads, factors.double()))


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_exact_in_float64(name: str) -> None:
    x, grad_y, geometry, grads = case(
        SHAPES[name], torch.device("cpu"), dtype=torch.float64
    )
    direction = torch.randn_like(grads[0])
    factors = torch.rand(len(x), dtype=torch.float64)

    # Sums of some hundred terms in another order, rounded to 1e-16 each.
    assert_near(conv_weight_grad(x, grad_y, geometry), grads, rtol=1e-13)
    assert_near(
        conv_weight_grad_moments(x, grad_y, direction, geometry),
        moments_of(grads, direction),
        rtol=1e-13,
    )
    assert_near(
        conv_weight_grad_sum(x, grad_y, factors, geometry),
        torch.einsum("m...,m->...", grads, factors),
        rtol=1e-13,
    )


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_an_example_with_factor_zero_never_reaches_the_sum(
    name: str,
    bad: float,
    runs: Runs,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "_PROGRAMS", 1)  # that walks over all examples
    shape = SHAPES[name]._replace(num_examples=4, num_views=1, size=(4, 4))
    x, grad_y, geometry, grads = case(shape, kernel_device)
    factors = torch.tensor([0.0, 0.7, 0.0, 1.0])
    x[0], grad_y[2] = bad, bad
    with np.errstate(invalid="ignore"):  # inf * 0, of which the interpreter warns
        found = runs.total(x, grad_y, factors.to(kernel_device), geometry)

    assert_near(found, 0.7 * grads[1] + grads[3])


def test_factors_of_zero_leave_a_sum_of_zero(
    runs: Runs, kernel_device: torch.device
) -> None:
    for name in BOTH_WAYS:
        x, grad_y, geometry, grads = case(SHAPES[name], kernel_device)
        found = runs.total(x, grad_y, torch.zeros(2, device=kernel_device), geometry)

        assert found.shape == grads.shape[1:]
        assert not found.any()


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_one_example_never_reaches_the_gradient_of_another(
    name: str, runs: Runs, kernel_device: torch.device
) -> None:
    x, grad_y, geometry, grads = case(
        SHAPES[name]._replace(num_examples=3, num_views=1), kernel_device
    )
    x[0], grad_y[2] = math.nan, math.nan
    found = runs.grad(x, grad_y, geometry)
    direction = torch.ones_like(found[0])
    moments = runs.moments(x, grad_y, direction, geometry)

    assert_near(found[1], grads[1])
    assert_near(moments[0, 1], grads[1].square().flatten(1).sum(1))
    assert not moments[0, ::2].isfinite().any()  # and a bad one is seen


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_stored_gradients_are_float32_sums_rounded_once(
    name: str, runs: Runs, kernel_device: torch.device
) -> None:
    x, grad_y, geometry, _ = case(SHAPES[name], kernel_device)
    wide = runs.grad(x, grad_y, geometry)

    # Triton's interpreter cuts bfloat16 off instead of rounding it, so float16 here.
    assert torch.equal(
        runs.grad(x, grad_y, geometry, dtype=torch.float16), wide.to(torch.float16)
    )


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_reference_rounds_bfloat16_gradients_once(name: str) -> None:
    x, grad_y, geometry, _ = case(SHAPES[name], torch.device("cpu"), torch.bfloat16)
    found = conv_weight_grad_reference(x, grad_y, geometry, dtype=torch.bfloat16)
    wide = conv_weight_grad_reference(x, grad_y, geometry)

    assert wide.dtype == torch.float32
    assert torch.equal(found, wide.to(torch.bfloat16))


def check_sums_of_narrow_products(
    shape: Shape, dtype: torch.dtype, runs: Runs, device: torch.device, *, rtol: float
) -> None:
    x, grad_y, geometry, grads = case(shape, device, dtype)
    direction, factors = torch.randn(grads.shape[1:]), torch.rand(len(x))
    moments = runs.moments(x, grad_y, direction.to(device), geometry)

    assert_near(runs.grad(x, grad_y, geometry), grads, rtol=rtol)
    for found, expected in zip(
        moments, moments_of(grads, direction.double()), strict=True
    ):
        assert_near(found, expected, rtol=rtol)
    assert_near(
        runs.total(x, grad_y, factors.to(device), geometry),
        torch.einsum("m...,m->...", grads, factors.double()),
        rtol=rtol,
    )


@pytest.mark.parametrize("name", ["stem", "3x3"])
def test_products_of_narrow_types_are_summed_in_float32(
    name: str, runs: Runs, kernel_device: torch.device
) -> None:
    # As wide as bfloat16, of which Triton's interpreter forms wrong products. A float16
    # sum would be off by 5e-4; a matrix unit adds with a little less than 24 bits.
    check_sums_of_narrow_products(
        SHAPES[name], torch.float16, runs, kernel_device, rtol=5e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 16, 64, 64, (32, 32), ConvGeometry(3, 1, 1)),
        Shape(4, 16, 64, 128, (32, 32), ConvGeometry(3, 2, 1)),
        Shape(4, 16, 128, 256, (16, 16), ConvGeometry(1, 2)),
        Shape(4, 16, 3, 16, (32, 32), ConvGeometry(3, 1, 1)),
        Shape(2, 2, 64, 64, (8, 8), ConvGeometry(3, 1, 1, 4)),
    ],
    ids=str,
)
def test_products_of_bfloat16_are_summed_in_float32(shape: Shape) -> None:
    # The matrix unit adds with slightly less than float32's 24 bits. In bfloat16 a sum
    # would be off by 4e-3.
    check_sums_of_narrow_products(
        shape, torch.bfloat16, KERNELS, torch.device("cuda"), rtol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bfloat16_gradients_are_rounded_once(name: str) -> None:
    x, grad_y, geometry, _ = case(SHAPES[name], torch.device("cuda"), torch.bfloat16)
    wide = conv_weight_grad_triton(x, grad_y, geometry)
    found = conv_weight_grad_triton(x, grad_y, geometry, dtype=torch.bfloat16)

    assert torch.equal(found, wide.to(torch.bfloat16))
