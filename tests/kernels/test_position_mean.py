"""The mean over positions, by PyTorch's own, also of examples and under a tape."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import position_mean
from dpsgd.kernels.tape import Tape


def images(dtype: torch.dtype) -> Tensor:
    """Images (M, K, C, H, W) as a network has them."""
    drawn = torch.randn(3 * 2, 5, 4, 6, dtype=torch.float64).to(dtype)
    return drawn.to(memory_format=torch.channels_last).unflatten(0, (3, 2))


def loss_with(mean: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: mean(x).square().sum()


def plain_mean(x: Tensor) -> Tensor:
    return x.mean((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_mean_and_gradient_are_those_of_pytorch(
    dtype: torch.dtype, is_recorded: bool
) -> None:
    x = images(dtype)
    with Tape() if is_recorded else nullcontext():
        y = vmap(position_mean)(x)
        found = vmap(grad(loss_with(position_mean)))(x)

    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(y, vmap(plain_mean)(x))
    # The quotient is rounded once here, and there before it is narrowed: to the same.
    assert torch.equal(found, vmap(grad(loss_with(plain_mean)))(x))


def test_gradient_takes_no_memory_of_its_own() -> None:
    x = images(torch.float32).flatten(0, 1).requires_grad_()
    with Tape():
        (found,) = torch.autograd.grad(position_mean(x).sum(), x)

    assert found.stride()[-2:] == (0, 0)
