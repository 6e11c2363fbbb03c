"""The end of a residual block under vmap, tapes and engines: gradients of examples."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from residual_inputs import (
    KINDS,
    PARTS,
    SHAPES,
    Inputs,
    assert_near,
    by_autograd,
    inputs_of,
)
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.clipping import clipped_grad
from dpsgd.kernels import Activation, position_mean, standardized_conv2d
from dpsgd.kernels import residual_activation as public
from dpsgd.kernels.geometry import ConvGeometry
from dpsgd.kernels.tape import RowsRecord, Tape


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
