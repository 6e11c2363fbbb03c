import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels.relu_group_norm import (
    relu_group_norm_backward_reference,
    relu_group_norm_backward_triton,
    relu_group_norm_reference,
    relu_group_norm_triton,
)

EPS = 1e-5
# (N, C, side, groups)
SHAPES = [(3, 16, 7, 16), (2, 32, 4, 16), (1, 64, 5, 4), (2, 16, 1, 1)]
FORWARD = [relu_group_norm_reference, relu_group_norm_triton]
BACKWARD = [relu_group_norm_backward_reference, relu_group_norm_backward_triton]


def case(shape: tuple[int, int, int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """x, scale, shift and grad_y, and what float64 autograd makes of them."""
    num_images, channels, side, num_groups = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad_y = torch.randn(2, num_images, channels, side, side, generator=generator)
    scale, shift = torch.randn(2, channels, generator=generator)
    leaves = [one.double().requires_grad_() for one in (x, scale, shift)]
    y = F.group_norm(F.relu(leaves[0]), num_groups, leaves[1], leaves[2], EPS)
    per_image = [
        torch.autograd.grad(y[n], leaves, grad_y[n].double(), retain_graph=True)
        for n in range(num_images)
    ]
    grads = [
        torch.stack([grads[0][n] for n, grads in enumerate(per_image)]),
        torch.stack([grads[1] for grads in per_image]),
        torch.stack([grads[2] for grads in per_image]),
    ]
    return [x, scale, shift, grad_y], [y.detach(), *grads]


@pytest.mark.parametrize("run", FORWARD, ids=["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_relu_then_group_norm(
    shape: tuple[int, int, int, int], run: object, kernel_device: torch.device
) -> None:
    inputs, expected = case(shape)
    x, scale, shift = (one.to(kernel_device) for one in inputs[:3])
    y = run(x, scale, shift, num_groups=shape[3], eps=EPS)[0]

    torch.testing.assert_close(y.cpu().double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_gives_affine_gradients_of_each_image(
    shape: tuple[int, int, int, int], which: int, kernel_device: torch.device
) -> None:
    inputs, expected = case(shape)
    x, scale, shift, grad_y = (one.to(kernel_device) for one in inputs)
    _, mean, rstd = FORWARD[which](x, scale, shift, num_groups=shape[3], eps=EPS)
    grads = BACKWARD[which](x, grad_y, mean, rstd, scale)

    for found, wanted in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)


def test_statistics_of_bfloat16_images_are_float32(kernel_device: torch.device) -> None:
    x = torch.randn(2, 16, 8, 8, device=kernel_device).bfloat16()
    scale, shift = torch.ones(2, 16, device=kernel_device)
    y, mean, rstd = relu_group_norm_triton(x, scale, shift, num_groups=4, eps=EPS)
    wide = relu_group_norm_reference(x.float(), scale, shift, num_groups=4, eps=EPS)

    assert y.dtype == torch.bfloat16
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, wide[1], rtol=1e-5, atol=1e-6)
    # The output alone is rounded to 8 bits; Triton's interpreter cuts them off.
    torch.testing.assert_close(y.float(), wide[0], rtol=2**-7, atol=1e-3)
