"""How kernels of a weight gradient are launched: read, shared by programs, chosen."""

from collections.abc import Callable

import pytest
import torch
from conv_cases import BOTH_WAYS, GATHERED, SHAPES, assert_near, case, moments_of

from dpsgd.kernels import conv_weight_grad_triton as launching
from dpsgd.kernels.conv_weight_grad import (
    conv_weight_grad,
    conv_weight_grad_moments,
    conv_weight_grad_moments_triton,
    conv_weight_grad_sum,
    conv_weight_grad_sum_triton,
    conv_weight_grad_triton,
)


def test_shapes_are_read_in_both_ways() -> None:
    pytest.importorskip("triton")
    gathered = {
        name
        for name, shape in SHAPES.items()
        if launching._Launch(*case(shape, torch.device("cpu"))[:3])._gathers
    }

    assert gathered == set(GATHERED)


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
