"""Activations of images and a bias by autograd in float64, also of examples."""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import Activation
from dpsgd.kernels import bias_activation as public
from dpsgd.kernels.bias_activation import (
    bias_activation_backward_reference,
    bias_activation_backward_triton,
    bias_activation_reference,
    bias_activation_triton,
)
from dpsgd.kernels.tape import RowsRecord, Tape

# (N, C, H, W): a cache line of channels, several, parts of one; one position.
SHAPES = [(2, 16, 5, 4), (1, 128, 3, 3), (3, 24, 6, 5), (2, 80, 1, 1)]
KINDS: list[Activation] = ["relu", "gelu"]
RUNS = {
    "reference": (bias_activation_reference, bias_activation_backward_reference),
    "triton": (bias_activation_triton, bias_activation_backward_triton),
}


class Inputs(NamedTuple):
    x: Tensor
    bias: Tensor
    grad_y: Tensor


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def inputs_of(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Inputs:
    x, grad_y = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    bias = torch.randn(shape[1])
    return Inputs(*(one.to(device) for one in (x, bias, grad_y)))


def by_definition(x: Tensor, bias: Tensor, kind: Activation) -> Tensor:
    value = x + bias.view(-1, 1, 1)
    if kind == "relu":
        return value.clamp(min=0)
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    return value * (1 + torch.tanh(inner)) / 2


def by_autograd(inputs: Inputs, kind: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and gradients of images (N, ...) and of the bias for each (N, C)."""
    x, bias, grad_y = (one.cpu().double() for one in inputs)
    x, bias = x.requires_grad_(), bias.repeat(len(x), 1).requires_grad_()
    y = torch.stack([by_definition(*one, kind) for one in zip(x, bias, strict=True)])
    return (y.detach(), *torch.autograd.grad(y, (x, bias), grad_y))


def by_operators(
    inputs: Inputs, kind: Activation, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    forward, backward = RUNS[name]
    y = forward(inputs.x, inputs.bias, kind)
    kept = y if kind == "relu" else inputs.x
    return (y, *backward(inputs.grad_y, kept, inputs.bias, kind))


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_autograd(
    shape: tuple[int, ...], kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(shape, kernel_device)
    assert_near(by_operators(inputs, kind, name), by_autograd(inputs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_shared_by_programs(
    kind: Activation, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module("dpsgd.kernels.bias_activation")
    monkeypatch.setattr(module, "_SPAN", 16)
    monkeypatch.setattr(module, "_ELEMENTS", 64)
    inputs = inputs_of(SHAPES[2], kernel_device)
    assert_near(by_operators(inputs, kind, "triton"), by_autograd(inputs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_images_are_rounded_once(
    kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(SHAPES[0], kernel_device, torch.bfloat16)
    y, grad_x, rows = by_operators(inputs, kind, name)
    expected = by_autograd(inputs, kind)

    assert y.dtype == grad_x.dtype == torch.bfloat16
    assert rows.dtype == torch.float32
    for found, wanted in zip((y, grad_x), expected[:2], strict=True):
        # A last bit of bfloat16: Triton's interpreter cuts off what it has no room for.
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=2**-7, atol=1e-5)
    assert_near((rows,), expected[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_passes_and_stays_in_its_image(
    kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(SHAPES[0], kernel_device)
    expected = by_operators(inputs, kind, name)
    inputs.x[0] = math.nan
    inputs.grad_y[0] = math.nan
    found = by_operators(inputs, kind, name)

    for one, other in zip(found, expected, strict=True):
        assert one[0].isnan().all()
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_triton", [False, True])
def test_examples_have_the_gradients_that_they_have_alone(
    kind: Activation,
    on_triton: bool,
    kernel_device: torch.device,
    on_kernels: Callable[[], None],
) -> None:
    if on_triton:
        pytest.importorskip("triton")
        on_kernels()
    x, bias, _ = inputs_of((3 * 2, 16, 4, 5), kernel_device)
    x = x.unflatten(0, (3, 2))

    def loss(x: Tensor, bias: Tensor, run: Callable[..., Tensor]) -> Tensor:
        return run(x, bias, kind).square().sum()

    def plain(x: Tensor, bias: Tensor, kind: Activation) -> Tensor:
        value = x + bias.view(-1, 1, 1)
        return F.relu(value) if kind == "relu" else F.gelu(value, approximate="tanh")

    def grads(run: Callable[..., Tensor], x: Tensor, bias: Tensor) -> Any:
        alone = grad(lambda x, bias: loss(x, bias, run), argnums=(0, 1))
        return vmap(alone, (0, None))(x, bias)

    expected = grads(plain, x.cpu().double(), bias.cpu().double())
    assert_near(grads(public, x, bias), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_tape_is_given_the_gradients_of_every_image(
    kind: Activation, trained: bool
) -> None:
    inputs = inputs_of(SHAPES[0], torch.device("cpu"))
    x, bias = inputs.x.requires_grad_(), inputs.bias.requires_grad_(trained)
    with Tape() as tape:
        y = public(x, bias, kind)
        leaves = [x, bias] if trained else [x]
        grad_x, *none = torch.autograd.grad(y, leaves, inputs.grad_y, allow_unused=True)

    expected = by_autograd(Inputs(x.detach(), bias.detach(), inputs.grad_y), kind)
    assert_near((y.detach(), grad_x), expected[:2])
    assert none == [None] * trained
    assert len(tape.records) == trained
    for record in tape.records:
        assert isinstance(record, RowsRecord)
        assert record.leaf is bias
        assert_near((record.grads,), expected[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (64, 1536, 7, 7)], ids=str)
def test_images_of_a_network_agree_on_a_gpu(
    shape: tuple[int, ...], kind: Activation
) -> None:
    inputs = inputs_of(shape, torch.device("cuda"), torch.bfloat16)
    found = by_operators(inputs, kind, "triton")
    wide = Inputs(*(one.double() for one in inputs))
    expected = by_operators(wide, kind, "reference")

    for one, wanted in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=2**-8, atol=1e-5)
    # Sums of up to 3,136 terms, which cancel.
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-4, atol=1e-3)
