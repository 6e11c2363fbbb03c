"""The linear layer: an ordinary one, unless a tape records it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from dpsgd.kernels import linear
from dpsgd.kernels.tape import LinearRecord, RowsRecord, Tape

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer() -> tuple[Tensor, Tensor]:
    return draw(3, 5).requires_grad_(), draw(3).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_computes_in_the_type_of_its_input(dtype: torch.dtype) -> None:
    x, (weight, bias) = draw(4, 5).to(dtype), layer()
    expected = F.linear(x, weight.to(dtype), bias.to(dtype))

    assert torch.equal(linear(x, weight, bias), expected)
    with Tape():
        assert torch.equal(linear(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tape_gets_what_the_gradients_are_made_of(dtype: torch.dtype) -> None:
    weight, bias = layer()
    x = draw(4, 5).to(dtype).requires_grad_()
    grad_y = draw(4, 3).to(dtype)
    with Tape() as tape:
        y = linear(x, weight, bias)
        grads = torch.autograd.grad(y, (x, weight, bias), grad_y, allow_unused=True)
    of_weight, of_bias = tape.records

    assert torch.equal(grads[0], grad_y @ weight.to(dtype))
    assert grads[1] is grads[2] is None
    wide = torch.promote_types(dtype, torch.float32)
    assert isinstance(of_weight, LinearRecord)
    assert of_weight.weight.data_ptr() == weight.data_ptr()
    for found, expected in [
        (of_weight.x, x),
        (of_weight.grad_y, grad_y),
    ]:
        assert found.dtype == wide
        assert torch.equal(found, expected.to(wide))
    assert isinstance(of_bias, RowsRecord)
    assert of_bias.leaf.data_ptr() == bias.data_ptr()
    assert torch.equal(of_bias.grads, grad_y.to(wide))


def test_records_of_mapped_examples_hold_all_of_their_features() -> None:
    weight, bias = (leaf.detach().double() for leaf in layer())
    x, target = draw(4, 2, 5).double(), draw(4, 2, 3).double()

    def loss(p: tuple[Tensor, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (linear(x, *p) - target).square().sum()

    expected = vmap(grad(loss), (None, 0, 0))((weight, bias), x, target)
    leaves = (weight.requires_grad_(), bias.requires_grad_())
    with Tape() as tape:
        losses = vmap(loss, (None, 0, 0))(leaves, x, target)
        losses.sum().backward()
    of_weight, of_bias = tape.records

    assert weight.grad is bias.grad is None
    assert isinstance(of_weight, LinearRecord)
    assert isinstance(of_bias, RowsRecord)
    assert torch.equal(of_weight.x, x.flatten(0, 1))
    grads = [one.unflatten(0, (4, 2)) for one in (of_weight.x, of_weight.grad_y)]
    torch.testing.assert_close(
        torch.einsum("mki,mko->moi", *grads), expected[0], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(of_bias.grads.unflatten(0, (4, 2)).sum(1), expected[1])


def test_examples_may_share_their_features() -> None:
    weight, bias = layer()
    x, factors = draw(2, 5), torch.tensor([1.0, 2.0, 3.0])
    with Tape() as tape:
        y = vmap(lambda factor: factor * linear(x, weight, bias))(factors)
        y.sum().backward()
    of_weight, _ = tape.records

    # Not mapped over, so the layer ran once, for all examples together.
    assert isinstance(of_weight, LinearRecord)
    assert torch.equal(of_weight.x, x)
    assert torch.equal(of_weight.grad_y, torch.full((2, 3), 6.0))


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_parameters_are_not_recorded(frozen: int) -> None:
    leaves = layer()
    leaves[frozen].requires_grad_(False)
    with Tape() as tape:
        linear(draw(4, 5), *leaves).sum().backward()

    assert [type(record) for record in tape.records] == [
        (LinearRecord, RowsRecord)[1 - frozen]
    ]


def test_mapping_over_parameters_is_refused_by_name() -> None:
    weight, bias = layer()
    many = torch.stack([weight, weight])

    with Tape(), pytest.raises(ValueError, match="linear: vmap may map over images"):
        vmap(linear, (None, 0, None))(draw(4, 5), many, bias)
