"""The norm of a sum and its gradients against autograd in float64, image by image."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels import relu_group_norm_cpu as walking
from dpsgd.kernels import relu_group_norm_triton as launching
from dpsgd.kernels.relu_group_norm import (
    Affine,
    relu_group_norm_backward_cpu,
    relu_group_norm_backward_reference,
    relu_group_norm_backward_triton,
    relu_group_norm_cpu,
    relu_group_norm_reference,
    relu_group_norm_triton,
)

EPS = 1e-5
RUNS = {
    "reference": (relu_group_norm_reference, relu_group_norm_backward_reference),
    "cpu": (relu_group_norm_cpu, relu_group_norm_backward_cpu),
    "triton": (relu_group_norm_triton, relu_group_norm_backward_triton),
}


class Shape(NamedTuple):
    num_images: int
    channels: int
    height: int
    width: int
    num_groups: int


class Addends(NamedTuple):
    """Which of its parts the sum has, and how many norms are taken of it."""

    bias: bool
    residual: bool
    num_outputs: int
    grad_total: bool


class Inputs(NamedTuple):
    x: Tensor
    bias: Tensor | None
    residual: Tensor | None
    affines: tuple[Affine, ...]
    grads_y: tuple[Tensor, ...]
    grad_total: Tensor | None


SHAPES = [
    Shape(3, 16, 7, 5, 16),
    Shape(2, 32, 4, 4, 16),
    Shape(1, 64, 5, 3, 4),
    Shape(2, 16, 1, 1, 1),
]
PLAIN = Addends(bias=False, residual=False, num_outputs=1, grad_total=False)
FULL = Addends(bias=True, residual=True, num_outputs=2, grad_total=True)
EVERY = [
    Addends(*one) for one in itertools.product(*[(False, True)] * 2, (1, 2), (0, 1))
]
# All of the sums on one shape, the least and the fullest of them on all shapes.
CASES = [
    *((SHAPES[0], addends) for addends in EVERY),
    *itertools.product(SHAPES[1:], [PLAIN, FULL]),
]


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


@pytest.fixture
def place(name: str, kernel_device: torch.device) -> torch.device:
    """Where an implementation runs: that of the CPU takes no other images."""
    return torch.device("cpu") if name == "cpu" else kernel_device


def inputs_of(shape: Shape, addends: Addends, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(sum(shape))

    def images() -> Tensor:
        return torch.randn(
            shape.num_images,
            shape.channels,
            shape.height,
            shape.width,
            generator=generator,
        ).to(device)

    def channels() -> Tensor:
        return torch.randn(shape.channels, generator=generator).to(device)

    return Inputs(
        x=images(),
        bias=channels() if addends.bias else None,
        residual=images() if addends.residual else None,
        affines=tuple((channels(), channels()) for _ in range(addends.num_outputs)),
        grads_y=tuple(images() for _ in range(addends.num_outputs)),
        grad_total=images() if addends.grad_total else None,
    )


def by_autograd(inputs: Inputs, num_groups: int) -> dict[str, Tensor]:
    """Outputs and gradients in float64, those of parameters for every image."""
    images = [by_autograd_of_one(inputs, n, num_groups) for n in range(len(inputs.x))]
    return {key: torch.stack([one[key] for one in images]) for key in images[0]}


def by_autograd_of_one(inputs: Inputs, n: int, num_groups: int) -> dict[str, Tensor]:
    channels = inputs.x.shape[1]
    x = inputs.x[n : n + 1].cpu().double().requires_grad_()
    bias = torch.zeros(channels) if inputs.bias is None else inputs.bias.cpu()
    bias = bias.double().requires_grad_()
    affines = [
        tuple(one.cpu().double().requires_grad_() for one in affine)
        for affine in inputs.affines
    ]
    total = x + bias.view(-1, 1, 1)
    if inputs.residual is not None:
        total = total + inputs.residual[n].cpu().double()
    outputs = [F.group_norm(F.relu(total), num_groups, *one, EPS) for one in affines]
    loss = sum(
        (y * grad[n].cpu().double()).sum()
        for y, grad in zip(outputs, inputs.grads_y, strict=True)
    )
    if inputs.grad_total is not None:
        loss = loss + (total * inputs.grad_total[n].cpu().double()).sum()
    leaves = {"grad_x": x, "grad_bias": bias}
    for index, (scale, shift) in enumerate(affines):
        leaves |= {f"grad_scale_{index}": scale, f"grad_shift_{index}": shift}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = dict(zip(leaves, grads, strict=True))
    found["grad_x"], found["total"] = found["grad_x"][0], total[0].detach()
    return found | {f"y_{n}": y[0].detach() for n, y in enumerate(outputs)}


def by_operators(inputs: Inputs, num_groups: int, name: str) -> dict[str, Tensor]:
    forward, backward = RUNS[name]
    outputs, total, mean, rstd = forward(
        inputs.x,
        inputs.bias,
        inputs.residual,
        inputs.affines,
        num_groups=num_groups,
        eps=EPS,
    )
    assert (total is None) == (inputs.residual is None)
    grad_x, grad_scales, grad_shifts, grad_bias = backward(
        inputs.x if total is None else total,
        inputs.bias if total is None else None,
        inputs.grads_y,
        inputs.grad_total,
        mean,
        rstd,
        tuple(scale for scale, _ in inputs.affines),
    )
    found = {"grad_x": grad_x, "grad_bias": grad_bias}
    if total is not None:
        found["total"] = total
    for key, tensors in {
        "y": outputs,
        "grad_scale": grad_scales,
        "grad_shift": grad_shifts,
    }.items():
        found |= {f"{key}_{index}": one for index, one in enumerate(tensors)}
    return found


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares float32 sums of up to 64 terms of size 1 to 10 with float64."""
    assert set(expected) - {"total"} <= set(found) <= set(expected)
    for key, one in found.items():
        torch.testing.assert_close(
            one.cpu().double(), expected[key], rtol=1e-4, atol=2e-5, msg=key
        )


@pytest.mark.parametrize(("shape", "addends"), CASES, ids=str)
def test_outputs_and_gradients_of_each_image_are_those_of_autograd(
    shape: Shape, addends: Addends, name: str, place: torch.device
) -> None:
    inputs = inputs_of(shape, addends, place)

    assert_near(
        by_operators(inputs, shape.num_groups, name),
        by_autograd(inputs, shape.num_groups),
    )


@pytest.mark.parametrize("addends", [PLAIN, FULL], ids=str)
def test_many_images_are_taken_a_few_at_a_time(
    addends: Addends, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES[0]
    two_images = 2 * shape.channels * shape.height * shape.width
    monkeypatch.setattr(walking, "_ELEMENTS", two_images)  # and one is left over
    inputs = inputs_of(shape, addends, torch.device("cpu"))

    assert_near(by_operators(inputs, 16, "cpu"), by_autograd(inputs, 16))


def test_channels_last_images_stay_so_on_the_cpu() -> None:
    inputs = inputs_of(SHAPES[0], FULL, torch.device("cpu"))
    x = inputs.x.contiguous(memory_format=torch.channels_last)
    found = by_operators(inputs._replace(x=x), 16, "cpu")

    for key in ("y_0", "y_1", "total", "grad_x"):
        assert found[key].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("addends", [PLAIN, FULL], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_images_larger_than_a_tile_are_walked_over(
    shape: Shape,
    addends: Addends,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launching, "_PER_THREAD", 1)
    num_positions = shape.height * shape.width
    tiling = launching._tiling(
        *(shape.channels, shape.num_groups, num_positions),
        num_outputs=addends.num_outputs,
    )
    assert tiling["ROWS"] < num_positions
    inputs = inputs_of(shape, addends, kernel_device)

    assert_near(
        by_operators(inputs, shape.num_groups, "triton"),
        by_autograd(inputs, shape.num_groups),
    )


@pytest.mark.parametrize("addends", [PLAIN, FULL], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_programs_take_some_of_the_groups(
    shape: Shape,
    addends: Addends,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launching, "_CHANNELS", 1)  # so many as a group has
    tiling = launching._tiling(shape.channels, shape.num_groups, 16, num_outputs=1)
    assert tiling["BLOCK_C"] == shape.channels // shape.num_groups
    inputs = inputs_of(shape, addends, kernel_device)

    assert_near(
        by_operators(inputs, shape.num_groups, "triton"),
        by_autograd(inputs, shape.num_groups),
    )


def test_one_image_never_reaches_another(name: str, place: torch.device) -> None:
    inputs = inputs_of(SHAPES[0], FULL, place)
    expected = by_operators(inputs, 16, name)
    inputs.x[0], inputs.grads_y[0][2] = math.nan, math.nan
    found = by_operators(inputs, 16, name)

    for key, one in expected.items():
        assert torch.equal(found[key][1], one[1])
    assert not found["grad_shift_0"][2].isfinite().any()  # and the bad one is seen


def test_nan_passes_through(name: str, place: torch.device) -> None:
    inputs = inputs_of(SHAPES[1], FULL, place)
    inputs.x[0] = math.nan
    found = by_operators(inputs, 16, name)

    assert found["y_0"][0].isnan().all()
    assert found["grad_scale_0"][0].isnan().all()
    assert found["y_0"][1].isfinite().all()


def test_statistics_of_bfloat16_images_are_float32(
    name: str, place: torch.device
) -> None:
    x = torch.randn(2, 16, 8, 8, device=place).bfloat16()
    affines = ((torch.ones(16).to(place), torch.zeros(16).to(place)),)
    forward, _ = RUNS[name]
    (y,), _, mean, rstd = forward(x, None, None, affines, num_groups=4, eps=EPS)
    (wide,), _, *statistics = relu_group_norm_reference(
        x.float(), None, None, affines, num_groups=4, eps=EPS
    )

    assert y.dtype == torch.bfloat16
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, statistics[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, statistics[1], rtol=1e-5, atol=1e-6)
    # The output alone is rounded to 8 bits; Triton's interpreter cuts them off.
    torch.testing.assert_close(y.float(), wide, rtol=2**-7, atol=1e-3)


def test_what_is_normalized_is_the_sum_as_it_is_returned(
    name: str, place: torch.device
) -> None:
    inputs = inputs_of(SHAPES[1], FULL, place)
    forward, _ = RUNS[name]
    assert inputs.residual is not None
    _, total, mean, rstd = forward(
        inputs.x.bfloat16(),
        inputs.bias,
        inputs.residual.bfloat16(),
        inputs.affines,
        num_groups=16,
        eps=EPS,
    )
    assert total is not None
    _, _, *statistics = relu_group_norm_reference(
        total.float(), None, None, inputs.affines, num_groups=16, eps=EPS
    )

    assert total.dtype == torch.bfloat16
    # The statistics of the unrounded sum are off by up to 1e-3.
    torch.testing.assert_close(mean, statistics[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, statistics[1], rtol=1e-5, atol=1e-6)


def test_gradients_of_bfloat16_images_are_summed_in_float32(
    name: str, place: torch.device
) -> None:
    inputs = inputs_of(SHAPES[0], FULL, place)
    narrow = inputs._replace(
        x=inputs.x.bfloat16(),
        residual=None,
        grads_y=tuple(grad.bfloat16() for grad in inputs.grads_y),
        grad_total=None,
    )
    wide = narrow._replace(
        x=narrow.x.float(), grads_y=tuple(grad.float() for grad in narrow.grads_y)
    )
    found = by_operators(narrow, 16, name)
    expected = by_operators(wide, 16, "reference")

    assert found["grad_x"].dtype == torch.bfloat16
    # Rounded to 8 bits, or cut off by Triton's interpreter.
    torch.testing.assert_close(
        found["grad_x"].float(), expected["grad_x"], rtol=2**-7, atol=1e-3
    )
    for key in ("grad_bias", "grad_scale_0", "grad_scale_1", "grad_shift_0"):
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_float64_is_exact(name: str) -> None:
    inputs = inputs_of(SHAPES[0], FULL, torch.device("cpu"))
    assert inputs.bias is not None
    assert inputs.residual is not None
    assert inputs.grad_total is not None
    wide = Inputs(
        inputs.x.double(),
        inputs.bias.double(),
        inputs.residual.double(),
        tuple((scale.double(), shift.double()) for scale, shift in inputs.affines),
        tuple(grad.double() for grad in inputs.grads_y),
        inputs.grad_total.double(),
    )
    found = by_operators(wide, 16, name)
    expected = by_autograd(wide, 16)

    for key, one in expected.items():
        assert found[key].dtype == torch.float64
        # Sums of 35 terms, rounded to 1e-16 each.
        torch.testing.assert_close(found[key], one, rtol=1e-12, atol=1e-12)
