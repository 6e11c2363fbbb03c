"""Weight gradients of convolutions, read in both ways, by autograd in float64.

Inputs are exact in float64, so what is off is a float32 sum: some hundred terms of size
1, each rounded to 6e-8. On a CPU Triton is interpreted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels import ConvGeometry


class Shape(NamedTuple):
    """Sizes of a convolution and of what it is given."""

    num_examples: int
    num_views: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    geometry: ConvGeometry


class Case(NamedTuple):
    """Inputs, and the gradients that are expected of them."""

    x: Tensor
    grad_y: Tensor
    geometry: ConvGeometry
    expected: Tensor  # (M, O, KH, KW, I / groups) float64


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
    """Sums over each output channel: of squares, of gradients, along a direction."""
    parts = [grads.square(), grads, grads * direction]
    return torch.stack([part.flatten(2).sum(2) for part in parts])
