"""The mean over positions, by PyTorch's own, also of examples and under a tape."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import position_mean
from dpsgd.kernels.tape import RowsRecord, Tape


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


def test_a_bias_may_be_added_to_the_mean() -> None:
    x, bias = images(torch.float32), torch.randn(5)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return position_mean(x, bias).square().sum()

    def by_definition(x: Tensor, bias: Tensor) -> Tensor:
        return plain_mean(x + bias.view(-1, 1, 1)).square().sum()

    found, expected = (
        vmap(grad(one, argnums=(0, 1)), (0, None))(x, bias)
        for one in (loss, by_definition)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    leaf = bias.requires_grad_()
    with Tape() as tape:
        y = vmap(position_mean, (0, None))(x, leaf)
        (none,) = torch.autograd.grad(y.square().sum(), leaf, allow_unused=True)
    (record,) = tape.records
    assert none is None
    assert isinstance(record, RowsRecord)
    per_example = record.grads.unflatten(0, (3, 2)).sum(1)
    torch.testing.assert_close(per_example, expected[1], rtol=1e-5, atol=1e-6)
