"""Inputs of the end of a residual block, and what autograd makes of them in float64."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpsgd.kernels import Activation

# (N, C, H, W): a cache line of channels, several, parts of one; one position, image.
SHAPES = [(2, 16, 5, 4), (1, 128, 3, 3), (3, 24, 6, 5), (2, 80, 1, 1), (2, 1, 3, 2)]
KINDS: list[Activation] = ["relu", "gelu"]
PARTS = ("shortcut", "branch", "shortcut_bias", "bias", "scale")


class Inputs(NamedTuple):
    """What goes into the operator, and the gradients of its outputs."""

    shortcut: Tensor
    branch: Tensor
    shortcut_bias: Tensor
    bias: Tensor
    scale: Tensor
    grad_total: Tensor
    grad_active: Tensor

    def to(self, *how: Any) -> "Inputs":
        return Inputs(*(one.to(*how) for one in self))


def inputs_of(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    per_channel: bool = False,
) -> Inputs:
    """Random images (N, C, H, W), with biases and scales that fit them."""
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


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares float32 sums with float64."""
    for part, one in found.items():
        torch.testing.assert_close(
            one.cpu().double(), expected[part], rtol=1e-5, atol=2e-5, msg=part
        )
