"""The operators of the end of a residual block against autograd in float64."""

import importlib
import math

import pytest
import torch
from residual_inputs import (
    KINDS,
    SHAPES,
    Inputs,
    assert_near,
    by_autograd,
    by_definition,
    inputs_of,
)
from torch import Tensor

from dpsgd.kernels import Activation
from dpsgd.kernels.residual_activation import (
    residual_activation_backward_reference,
    residual_activation_backward_triton,
    residual_activation_reference,
    residual_activation_triton,
)

RUNS = {
    "reference": (
        residual_activation_reference,
        residual_activation_backward_reference,
    ),
    "triton": (residual_activation_triton, residual_activation_backward_triton),
}


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def by_operators(inputs: Inputs, kind: Activation, name: str) -> dict[str, Tensor]:
    """The same of the operators, and their sums brought to the gradients' form."""
    forward, backward = RUNS[name]
    bias, scale = inputs.bias, inputs.scale
    shared = {"bias": bias, "scale": scale, "kind": kind}
    total, active = forward(
        inputs.shortcut, inputs.branch, shortcut_bias=inputs.shortcut_bias, **shared
    )
    kept = active if kind == "relu" else total
    grads = (inputs.grad_total, inputs.grad_active)
    images = backward(grads, kept, inputs.branch, **shared)
    shortcut, branch, sums, products = images
    if scale.shape[1] == 1:
        products = products.sum(1, keepdim=True)
    return {
        "total": total,
        "active": active,
        "shortcut": shortcut,
        "branch": branch,
        "shortcut_bias": sums,
        "bias": sums * scale,
        "scale": products,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_autograd(
    shape: tuple[int, ...],
    per_channel: bool,
    kind: Activation,
    name: str,
    kernel_device: torch.device,
) -> None:
    inputs = inputs_of(shape, kernel_device, per_channel=per_channel)
    assert_near(by_operators(inputs, kind, name), by_autograd(inputs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_shared_by_programs(
    kind: Activation, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module("dpsgd.kernels.residual_activation_triton")
    monkeypatch.setattr(module, "_SPAN", 16)
    monkeypatch.setattr(module, "_ELEMENTS", 256)
    inputs = inputs_of(SHAPES[2], kernel_device)
    assert_near(by_operators(inputs, kind, "triton"), by_autograd(inputs, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absent", ["grad_total", "grad_active"])
def test_outputs_that_nothing_reads_have_no_gradient(
    absent: str, kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(SHAPES[0], kernel_device)
    zero = torch.zeros_like(inputs.branch)
    expected = by_autograd(inputs._replace(**{absent: zero}), kind)

    assert_near(by_operators(inputs._replace(**{absent: None}), kind, name), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortcut_needs_no_bias_and_a_scale_may_be_of_all(
    kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(SHAPES[2], kernel_device)
    scale, none = inputs.scale[:1], torch.zeros_like(inputs.bias)
    all_alike = scale.repeat(len(inputs.branch), 1)
    expected = by_autograd(inputs._replace(shortcut_bias=none, scale=all_alike), kind)
    total, active = RUNS[name][0](
        inputs.shortcut,
        inputs.branch,
        shortcut_bias=None,
        bias=inputs.bias,
        scale=scale,
        kind=kind,
    )
    assert_near({"total": total, "active": active}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_images_are_rounded_once(
    kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(SHAPES[0], kernel_device, torch.bfloat16)
    found, expected = by_operators(inputs, kind, name), by_autograd(inputs, kind)
    images = {"total", "active", "shortcut", "branch"}
    # The slope of GELU is that of the rounded sum.
    slack = 2**-5 if kind == "gelu" else 1e-5

    for part, one in found.items():
        assert one.dtype == (torch.bfloat16 if part in images else torch.float32)
        if part in images:
            # A last bit of bfloat16: Triton's interpreter cuts off what it has no room
            # for.
            atol = slack if part in ("shortcut", "branch") else 1e-5
            torch.testing.assert_close(
                one.cpu().double(), expected[part], rtol=2**-7, atol=atol
            )
    if kind == "relu":
        sums = {part: one for part, one in found.items() if part not in images}
        assert_near(sums, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_passes_and_stays_in_its_image(
    kind: Activation, name: str, kernel_device: torch.device
) -> None:
    inputs = inputs_of(SHAPES[0], kernel_device)
    expected = by_operators(inputs, kind, name)
    for one in (inputs.branch, inputs.grad_active):
        one[0] = math.nan
    found = by_operators(inputs, kind, name)

    for part, one in found.items():
        assert one[0].isnan().all()
        assert torch.equal(one[1], expected[part][1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (64, 1536, 7, 7)], ids=str)
def test_images_of_a_network_agree_on_a_gpu(
    shape: tuple[int, ...], kind: Activation
) -> None:
    inputs = inputs_of(shape, torch.device("cuda"), torch.bfloat16)
    value, _ = by_definition(*(one.float() for one in inputs[:5]), kind=kind)
    # Rounding may take a sum across 0, where the slope of ReLU jumps.
    inputs.grad_active[value.abs() < 2**-5] = 0
    found = by_operators(inputs, kind, "triton")
    expected = by_operators(inputs, kind, "reference")

    for part, one in found.items():
        if one.ndim == 4:  # sums of up to 4 are rounded by 2^-7, and slopes with them
            torch.testing.assert_close(one, expected[part], rtol=2**-7, atol=2**-6)
        else:  # up to 800,000 terms, which cancel
            torch.testing.assert_close(one, expected[part], rtol=1e-3, atol=0.05)
