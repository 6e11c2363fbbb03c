"""The end of a residual block by autograd in float64, also of examples."""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.clipping import clipped_grad
from dpsgd.kernels import Activation, position_mean, standardized_conv2d
from dpsgd.kernels import residual_activation as public
from dpsgd.kernels.geometry import ConvGeometry
from dpsgd.kernels.residual_activation import (
    residual_activation_backward_reference,
    residual_activation_backward_triton,
    residual_activation_reference,
    residual_activation_triton,
)
from dpsgd.kernels.tape import RowsRecord, Tape

# (N, C, H, W): a cache line of channels, several, parts of one; one position, image.
SHAPES = [(2, 16, 5, 4), (1, 128, 3, 3), (3, 24, 6, 5), (2, 80, 1, 1), (2, 1, 3, 2)]
KINDS: list[Activation] = ["relu", "gelu"]
RUNS = {
    "reference": (
        residual_activation_reference,
        residual_activation_backward_reference,
    ),
    "triton": (residual_activation_triton, residual_activation_backward_triton),
}
PARTS = ("shortcut", "branch", "shortcut_bias", "bias", "scale")


class Inputs(NamedTuple):
    shortcut: Tensor
    branch: Tensor
    shortcut_bias: Tensor
    bias: Tensor
    scale: Tensor
    grad_total: Tensor
    grad_active: Tensor

    def to(self, *how: Any) -> "Inputs":
        return Inputs(*(one.to(*how) for one in self))


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def inputs_of(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    per_channel: bool = False,
) -> Inputs:
    shortcut, branch, grad_total, grad_active = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(4)
    )
    shortcut_bias, bias = torch.randn(2, shape[1]).unbind()
    scale = torch.rand(shape[0], shape[1] if per_channel else 1) - 0.5
    inputs = Inputs(
        shortcut, branch, shortcut_bias, bias, scale, grad_total, grad_active
    )
    return inputs.to(device)


def by_definition(
    shortcut: Tensor,
    branch: Tensor,
    shortcut_bias: Tensor,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor]:
    """Of images (..., C, H, W), and biases and scales (..., C or 1)."""
    bias, shortcut_bias, scale = (
        one[..., None, None] for one in (bias, shortcut_bias, scale)
    )
    value = shortcut + shortcut_bias + scale * (branch + bias)
    if kind == "relu":
        return value, value.clamp(min=0)
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    return value, value * (1 + torch.tanh(inner)) / 2


def by_autograd(inputs: Inputs, kind: Activation) -> dict[str, Tensor]:
    """Outputs, and gradients; those of biases and scales for each image."""
    wide = inputs.to("cpu", torch.float64)
    num_images = len(wide.branch)
    leaves = wide._asdict() | {
        one: getattr(wide, one).repeat(num_images, 1)
        for one in ("shortcut_bias", "bias")
    }
    leaves = {one: leaves[one].detach().requires_grad_() for one in PARTS}
    outputs = by_definition(**leaves, kind=kind)
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), (wide.grad_total, wide.grad_active)
    )
    total, active = (one.detach() for one in outputs)
    return {"total": total, "active": active, **dict(zip(leaves, grads, strict=True))}


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


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for part, one in found.items():
        torch.testing.assert_close(
            one.cpu().double(), expected[part], rtol=1e-5, atol=2e-5, msg=part
        )


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


def plain(
    shortcut: Tensor,
    branch: Tensor,
    *,
    shortcut_bias: Tensor | None,
    bias: Tensor,
    scale: Tensor,
    kind: Activation,
) -> tuple[Tensor, Tensor]:
    """With torch's own operators, which vmap and autograd know."""
    total = shortcut + scale[:, :, None, None] * (branch + bias.view(-1, 1, 1))
    if shortcut_bias is not None:
        total = total + shortcut_bias.view(-1, 1, 1)
    active = F.relu(total) if kind == "relu" else F.gelu(total, approximate="tanh")
    return total, active


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_triton", [False, True])
@pytest.mark.parametrize("scale_of", ["all", "an example", "a view", "a channel"])
def test_examples_have_the_gradients_that_they_have_alone(
    kind: Activation,
    on_triton: bool,
    scale_of: str,
    kernel_device: torch.device,
    on_kernels: Callable[[], None],
) -> None:
    if on_triton:
        pytest.importorskip("triton")
        on_kernels()
    inputs = inputs_of((3 * 2, 16, 4, 5), kernel_device, per_channel=True)
    shortcut, branch, scale = (
        one.unflatten(0, (3, 2))
        for one in (inputs.shortcut, inputs.branch, inputs.scale)
    )
    scale, dim = {
        "all": (scale[0, :1, :1], None),
        "an example": (scale[:, :1, :1], 0),
        "a view": (scale[:, :, :1], 0),
        "a channel": (scale, 0),
    }[scale_of]

    def loss(run: Callable[..., Any], *parts: Tensor) -> Tensor:
        total, active = run(**dict(zip(PARTS, parts, strict=True)), kind=kind)
        return (total.square() * 0.5 + active.square() * total).sum()

    def grads(run: Callable[..., Any], *parts: Tensor) -> tuple[Tensor, ...]:
        alone = grad(lambda *parts: loss(run, *parts), argnums=tuple(range(5)))
        return vmap(alone, (0, 0, None, None, dim))(*parts)

    parts = (shortcut, branch, inputs.shortcut_bias, inputs.bias, scale)
    expected = grads(plain, *(one.cpu().double() for one in parts))
    found = grads(public, *parts)
    for one, wanted in zip(found, expected, strict=True):
        # Cubes of sums of four normals, added up over an image.
        atol = 1e-6 * float(wanted.abs().max())
        torch.testing.assert_close(one.cpu().double(), wanted, rtol=1e-5, atol=atol)
    for index in range(3):  # and one example does not see another
        alone = [one[index : index + 1] for one in (shortcut, branch)]
        own = scale if dim is None else scale[index : index + 1]
        single = grads(public, *alone, inputs.shortcut_bias, inputs.bias, own)
        for one, wanted in zip(single, found, strict=True):
            torch.testing.assert_close(one[0], wanted[index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", list(product([True, False], repeat=2)))
def test_a_tape_is_given_the_gradients_of_every_image(
    kind: Activation, trained: tuple[bool, bool]
) -> None:
    inputs = inputs_of(SHAPES[0], torch.device("cpu"))
    parts = {one: getattr(inputs, one).requires_grad_() for one in PARTS}
    for one, is_trained in zip(("shortcut_bias", "bias"), trained, strict=True):
        parts[one].requires_grad_(is_trained)
    leaves = [one for one in parts.values() if one.requires_grad]
    with Tape() as tape:
        outputs = public(**parts, kind=kind)
        grads = torch.autograd.grad(
            outputs, leaves, (inputs.grad_total, inputs.grad_active), allow_unused=True
        )

    expected = by_autograd(Inputs(*(one.detach() for one in inputs)), kind)
    images = ("shortcut", "branch", "scale")
    assert_near(dict(zip(images, (*grads[:2], grads[-1]), strict=True)), expected)
    assert list(grads[2:-1]) == [None] * sum(trained)
    assert len(tape.records) == sum(trained)
    names = {parts[one].data_ptr(): one for one in ("shortcut_bias", "bias")}
    for record in tape.records:
        assert isinstance(record, RowsRecord)
        found = {names[record.leaf.data_ptr()]: record.grads}
        assert_near(found, expected)


@pytest.mark.parametrize("read", [0, 1])
def test_one_of_the_outputs_is_enough(read: int) -> None:
    inputs = inputs_of(SHAPES[0], torch.device("cpu"))
    found, expected = [], []
    for grads, run, context in (
        (found, public, Tape()),
        (expected, plain, nullcontext()),
    ):
        parts = {one: getattr(inputs, one).clone().requires_grad_() for one in PARTS}
        with context:
            y = run(**parts, kind="relu")[read]
            leaves = [parts[one] for one in ("shortcut", "branch", "scale")]
            grads += torch.autograd.grad(y, leaves, inputs.grad_total)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def network_loss(params: dict[str, Tensor], images: Tensor, label: Tensor) -> Tensor:
    """Of two blocks, the first with a projection, in which views are left out."""
    geometry = ConvGeometry(3, 1, 1)
    keep = (images.mean((1, 2, 3)) > 0).to(images.dtype)[:, None]
    total, active = None, images
    for block in ("0", "1"):
        branch = standardized_conv2d(active, params[f"w{block}"], None, geometry)
        shortcut, bias = total, None
        if shortcut is None:
            shortcut = standardized_conv2d(active, params["projection"], None, geometry)
            bias = params["projection_bias"]
        total, active = public(
            shortcut,
            branch,
            shortcut_bias=bias,
            bias=params[f"b{block}"],
            scale=0.2 * params[f"gain{block}"].view(1, 1) * keep,
            kind="relu",
        )
    logits = position_mean(active)
    return F.cross_entropy(logits, label.expand(len(images)))


@pytest.fixture(params=[False, True], ids=["references", "kernels"])
def implementation(
    request: pytest.FixtureRequest, on_kernels: Callable[[], None]
) -> Iterator[None]:
    if request.param:
        on_kernels()
    return


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("engine", ["vmap", "ghost"])
def test_engines_clip_what_a_loop_over_examples_clips(
    engine: str, kernel_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = {
        "w0": draw(8, 3, 3, 3),
        "projection": draw(8, 3, 3, 3),
        "w1": draw(8, 3, 3, 8),
        **{name: draw(8) for name in ("b0", "b1", "projection_bias")},
        "gain0": draw(),
        "gain1": draw(),
    }
    images, labels = draw(3, 2, 3, 5, 4), torch.tensor([0, 2, 4])
    leaves = {one: leaf.double().requires_grad_() for one, leaf in params.items()}
    norms, total = [], {one: torch.zeros_like(leaf) for one, leaf in leaves.items()}
    for example in zip(images.double(), labels, strict=True):
        loss = network_loss(leaves, *example)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = float(torch.cat([one.flatten() for one in grads]).norm())
        norms.append(norm)
        for one, leaf_grad in zip(leaves, grads, strict=True):
            total[one] += leaf_grad * min(1.0, 0.1 / norm)
    grad_fn = clipped_grad(network_loss, clipping_norm=0.1, engine=engine)
    found = grad_fn(
        {one: leaf.to(kernel_device) for one, leaf in params.items()},
        images.to(kernel_device),
        labels.to(kernel_device),
    )

    assert all(one.abs().max() > 0 for one in total.values())
    torch.testing.assert_close(
        found.per_sample_norms.cpu(), torch.tensor(norms), rtol=1e-4, atol=0
    )
    for one, leaf in total.items():
        torch.testing.assert_close(
            found.clipped_sum[one].cpu().double(), leaf, rtol=1e-4, atol=1e-6
        )


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
