"""A network of all operators, and the same operators in plain torch as an oracle."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels import (
    ConvGeometry,
    linear,
    standardized_conv2d,
    sum_relu_group_norm,
)

Params = dict[str, Tensor]
Affine = tuple[Tensor, Tensor]


class Operators(NamedTuple):
    """What a network is made of, in one implementation."""

    conv: Callable[..., Tensor]
    norm: Callable[..., tuple[tuple[Tensor, ...], Tensor | None]]
    linear: Callable[..., Tensor]


def plain_conv(
    x: Tensor, weight: Tensor, gain: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Convolves with weights that are standardised by the definition."""
    if gain is not None:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        squared_norm = centred.square().sum((1, 2, 3), keepdim=True)
        unit = centred / squared_norm.clamp(min=1e-4).sqrt()
        weight = unit * gain.view(-1, 1, 1, 1)
    _, stride, padding, groups = geometry
    kernel = weight.permute(0, 3, 1, 2)  # (O, I / G, KH, KW)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)


def plain_norm(
    x: Tensor,
    biases: tuple[Tensor, ...],
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    *,
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Adds up, then normalises."""
    for bias in biases:
        x = x + bias.view(-1, 1, 1)
    if residual is not None:
        x = x + residual
    active = F.relu(x)
    outputs = tuple(F.group_norm(active, num_groups, *one, eps) for one in affines)
    return outputs, None if residual is None else x


PLAIN = Operators(plain_conv, plain_norm, F.linear)
OURS = Operators(standardized_conv2d, sum_relu_group_norm, linear)


def parameters(device: torch.device) -> Params:
    """Draws float32 parameters, in the order of the forward pass."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "stem": draw(8, 3, 3, 3),
        "stem_gain": draw(8),
        "stem_bias": draw(8),
        "scale": draw(8),
        "shift": draw(8),
        "shortcut_scale": draw(8),
        "shortcut_shift": draw(8),
        "shortcut": draw(8, 1, 1, 8),
        "shortcut_bias": draw(8),
        # So small that the bound of the standardisation holds for it.
        "tiny": 1e-4 * draw(8, 3, 3, 4),
        "tiny_gain": draw(8),
        "tiny_bias": draw(8),
        "last_scale": draw(8),
        "last_shift": draw(8),
        "classifier": draw(5, 8),
        "classifier_bias": draw(5),
    }


def loss(
    params: Params, images: Tensor, label: Tensor, operators: Operators = OURS
) -> Tensor:
    """A stem, two norms of it, and a block whose sum has two biases and a residual.

    Args:
        params: Of `parameters`.
        images: (K, 3, 4, 4) views of one example.
        label: () its class.
        operators: Implementation.
    """
    p, (conv, norm, last) = params, operators
    h = conv(images, p["stem"], p["stem_gain"], ConvGeometry(3, 1, 1))
    (h, other), _ = norm(
        h,
        (p["stem_bias"],),
        None,
        ((p["scale"], p["shift"]), (p["shortcut_scale"], p["shortcut_shift"])),
        num_groups=4,
        eps=1e-5,
    )
    shortcut = conv(other, p["shortcut"], None, ConvGeometry(1, 2))
    h = conv(h, p["tiny"], p["tiny_gain"], ConvGeometry(3, 2, 1, 2))
    biases = (p["tiny_bias"], p["shortcut_bias"])
    affine = (p["last_scale"], p["last_shift"])
    (y,), total = norm(h, biases, shortcut, (affine,), num_groups=2, eps=1e-5)
    features = (y * 0.5 + total).mean((-2, -1))  # (K, C): the sum is used by itself too
    logits = last(features, p["classifier"], p["classifier_bias"])
    return F.cross_entropy(logits, label.expand(len(images)))


def images_and_labels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Three examples of two views, with their classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 2, 3, 4, 4, generator=generator)
    return images.to(device), torch.tensor([0, 2, 4]).to(device)


def expected_grads(params: Params, images: Tensor, labels: Tensor) -> Params:
    """Returns per-sample gradients by plain torch in float64, an example at a time."""
    leaves = {
        name: leaf.detach().cpu().double().requires_grad_()
        for name, leaf in params.items()
    }
    rows = [
        torch.autograd.grad(
            loss(leaves, views.cpu().double(), label.cpu(), PLAIN),
            list(leaves.values()),
        )
        for views, label in zip(images, labels, strict=True)
    ]
    grads = [torch.stack(one) for one in zip(*rows, strict=True)]
    return dict(zip(leaves, grads, strict=True))


def assert_near(found: Params, expected: Params) -> None:
    """Compares gradients through float32 layers with float64, leaf by leaf.

    A bias before a norm, and weights before their mean is taken off, have small
    gradients that are sums of large terms: the largest entry is the measure.
    """
    assert set(found) == set(expected)
    for name, grad in found.items():
        atol = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(
            grad.detach().cpu().double(), expected[name], rtol=1e-4, atol=atol, msg=name
        )
