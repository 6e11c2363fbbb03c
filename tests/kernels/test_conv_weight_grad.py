"""All uses of a weight gradient against autograd in float64, example by example.

Inputs are exact in float64, so what is off is a float32 sum: some hundred terms of size
1, each rounded to 6e-8. On a CPU Triton is interpreted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


class Shape(NamedTuple):
    num_examples: int
    num_views: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    geometry: ConvGeometry


class Case(NamedTuple):
    x: Tensor
    grad_y: Tensor
    geometry: ConvGeometry
    expected: Tensor  # (M, O, KH, KW, I / groups) float64


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
# Read pixel by pixel.
GATHERED = {
    "stem": Shape(2, 3, 3, 16, (7, 5), ConvGeometry(3, 1, 1)),
    "odd_channels": Shape(1, 2, 20, 33, (8, 6), ConvGeometry(3, 2, 1)),
    "odd_image": Shape(3, 1, 16, 8, (5, 7), ConvGeometry(1, 2)),
    "7x7": Shape(2, 2, 3, 8, (9, 9), ConvGeometry(7, 2, 3)),
    "5x5": Shape(1, 1, 4, 4, (6, 5), ConvGeometry(5, 1, 2)),
    "odd_groups": Shape(2, 1, 6, 9, (5, 4), ConvGeometry(3, 1, 1, 3)),
    "one_pixel": Shape(2, 1, 5, 3, (1, 1), ConvGeometry(3, 1, 1)),
}
# Read through tensor descriptors.
DESCRIBED = {
    "3x3": Shape(2, 2, 16, 16, (5, 6), ConvGeometry(3, 1, 1)),
    "1x1": Shape(3, 1, 16, 8, (3, 5), ConvGeometry(1)),
    "3x3_stride_2": Shape(2, 1, 32, 20, (6, 4), ConvGeometry(3, 2, 1)),
    "1x1_stride_2": Shape(2, 2, 16, 4, (4, 6), ConvGeometry(1, 2)),
    "no_padding": Shape(1, 1, 16, 8, (6, 5), ConvGeometry(3)),
    "wide_padding": Shape(1, 2, 16, 4, (3, 4), ConvGeometry(3, 1, 2)),
    "many_tiles": Shape(1, 2, 128, 68, (4, 3), ConvGeometry(1)),
    "wide_image": Shape(1, 1, 16, 4, (2, 70), ConvGeometry(3, 1, 1)),
    "groups": Shape(2, 1, 32, 24, (4, 4), ConvGeometry(3, 1, 1, 2)),
    # A tile reaches beyond the channels of its pixel, into what lies there.
    "part_of_a_tile": Shape(2, 1, 8, 8, (4, 5), ConvGeometry(3, 1, 1)),
    "part_of_a_tile_stride_2": Shape(1, 2, 24, 12, (4, 4), ConvGeometry(3, 2, 1)),
    "part_of_a_tile_1x1": Shape(2, 1, 72, 8, (4, 4), ConvGeometry(1, 2)),
    "part_of_a_tile_groups": Shape(1, 1, 16, 32, (4, 4), ConvGeometry(3, 1, 1, 4)),
}
SHAPES = {**GATHERED, **DESCRIBED}
BOTH_WAYS = ["stem", "3x3_stride_2"]


@pytest.fixture(params=["reference", "triton"])
def runs(request: pytest.FixtureRequest) -> Runs:
    if request.param == "reference":
        return REFERENCES
    pytest.importorskip("triton")
    return KERNELS


def case(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32
) -> Case:
    """Inputs, and the gradients by one float64 backward pass an example."""
    num_examples, num_views, in_channels, out_channels, size, geometry = shape
    side, stride, padding, groups = geometry
    generator = torch.Generator().manual_seed(in_channels * out_channels + size[0])
    x = torch.randn(num_examples, num_views, in_channels, *size, generator=generator)
    x = x.to(dtype)
    weight = torch.zeros(
        out_channels,
        in_channels // groups,
        side,
        side,
        dtype=torch.float64,
        requires_grad=True,
    )
    grads_y, expected = [], []
    for images in x.double():
        y = F.conv2d(images, weight, stride=stride, padding=padding, groups=groups)
        grad_y = torch.randn(y.shape, generator=generator).to(dtype)
        (grad,) = torch.autograd.grad(y, weight, grad_y.double())
        grads_y.append(grad_y)
        expected.append(grad.permute(0, 2, 3, 1))  # (O, KH, KW, I / G)
    return Case(
        x.to(device),
        torch.stack(grads_y).to(device),
        geometry,
        torch.stack(expected),
    )


def assert_near(found: Tensor, expected: Tensor, *, rtol: float = 1e-5) -> None:
    """Compares with float64, relative to the largest entry: sums may cancel."""
    atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=atol)


def moments_of(grads: Tensor, direction: Tensor) -> Tensor:
    parts = [grads.square(), grads, grads * direction]
    return torch.stack([part.flatten(2).sum(2) for part in parts])


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


def test_shapes_are_read_in_both_ways() -> None:
    pytest.importorskip("triton")
    gathered = {
        name
        for name, shape in SHAPES.items()
        if launching._Launch(*case(shape, torch.device("cpu"))[:3])._gathers
    }

    assert gathered == set(GATHERED)


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
def test_one_program_adds_up_many_examples(
    name: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    shape = SHAPES[name]._replace(num_examples=5, num_views=1, size=(4, 4))
    x, grad_y, geometry, grads = case(shape, kernel_device)
    factors = torch.rand(5)
    launch = launching._Launch(x, grad_y, geometry, most=64)
    monkeypatch.setattr(launching, "_PROGRAMS", 2 * launch.num_tiles)
    found = conv_weight_grad_sum_triton(x, grad_y, factors.to(kernel_device), geometry)

    assert_near(found, torch.einsum("m...,m->...", grads, factors.double()))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_one_program_measures_many_examples(
    name: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    shape = SHAPES[name]._replace(num_examples=5, num_views=1, size=(4, 4))
    x, grad_y, geometry, grads = case(shape, kernel_device)
    launch = launching._Launch(x, grad_y, geometry, most=64)
    assert launch.takes_one_step
    monkeypatch.setattr(launching, "_PROGRAMS", 2 * launch.num_tiles)
    direction = torch.randn(grads.shape[1:]).to(kernel_device)
    found = conv_weight_grad_moments_triton(x, grad_y, direction, geometry)

    wide = direction.cpu().double()
    expected = [grads.square(), grads, grads * wide]
    for one, parts in zip(found, expected, strict=True):
        assert_near(one, parts.flatten(2).sum(2))


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


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_images_that_are_channels_last_are_not_copied(
    name: str, kernel_device: torch.device
) -> None:
    pytest.importorskip("triton")
    x, grad_y, geometry, expected = case(SHAPES[name], kernel_device)
    x, grad_y = (
        launching._channels_last(one).unflatten(0, one.shape[:2]) for one in (x, grad_y)
    )
    found = conv_weight_grad_triton(x, grad_y, geometry)

    assert launching._channels_last(x).data_ptr() == x.data_ptr()
    assert_near(found, expected)


def test_the_public_functions_run_the_kernels(
    on_kernels: Callable[[], None],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, grad_y, geometry, grads = case(SHAPES["1x1"], kernel_device)
    direction, factors = torch.ones_like(grads[0]).float(), torch.ones(3)
    on_kernels()
    launched = []
    launch = launching._Launch.__call__
    monkeypatch.setattr(
        launching._Launch,
        "__call__",
        lambda self, mode, *rest, **others: (
            launched.append(mode),
            launch(self, mode, *rest, **others),
        ),
    )
    conv_weight_grad(x, grad_y, geometry)
    conv_weight_grad_moments(x, grad_y, direction.to(kernel_device), geometry)
    conv_weight_grad_sum(x, grad_y, factors.to(kernel_device), geometry)

    assert launched == ["store", "moments", "sum"]


def test_float64_stays_float64_where_kernels_run(
    on_kernels: Callable[[], None], kernel_device: torch.device
) -> None:
    x, grad_y, geometry, grads = case(
        SHAPES["stem"], kernel_device, dtype=torch.float64
    )
    ones = torch.ones_like(grads[0]).to(kernel_device)
    on_kernels()

    assert_near(conv_weight_grad(x, grad_y, geometry), grads, rtol=1e-13)
    moments = conv_weight_grad_moments(x, grad_y, ones, geometry)
    assert_near(moments, moments_of(grads, ones.cpu()), rtol=1e-13)
    total = conv_weight_grad_sum(x, grad_y, ones.new_ones(2), geometry)
    assert_near(total, grads.sum(0), rtol=1e-13)


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
