"""A linear layer that a tape can record."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.dispatch import fold, require_unbatched
from dpsgd.kernels.tape import LinearRecord, active_tape, leaf_grad

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns `x @ weight.T + bias`, in the type of `x`.

    Args:
        x: (N, I) features.
        weight: (O, I) parameter.
        bias: (O,) parameter.
    """
    if active_tape() is None:
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(Function):
    """Under a tape: the features of all examples in one product."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        tape = active_tape()
        assert tape is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        if weight.requires_grad:
            tape.records.append(LinearRecord(weight, x.to(wide), grad_y.to(wide)))
        of_bias = leaf_grad(bias, grad_y.to(wide))  # recorded
        return grad_y @ weight.to(x.dtype), None, of_bias

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, int]:
        require_unbatched("linear", in_dims[1:])
        y: Tensor = _Linear.apply(fold(x, in_dims[0], info.batch_size), weight, bias)
        return y.unflatten(0, (info.batch_size, -1)), 0
