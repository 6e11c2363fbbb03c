"""ReLU and GELU, and their gradients: in PyTorch, and for use within kernels."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["Activation", "activation", "activation_backward"]

Activation = Literal["relu", "gelu"]


def activation(x: Tensor, kind: Activation) -> Tensor:
    """Returns ReLU, or GELU by its tanh form, in the type of `x`."""
    return F.relu(x) if kind == "relu" else F.gelu(x, approximate="tanh")


def activation_backward(grad_y: Tensor, x: Tensor, kind: Activation) -> Tensor:
    """Returns the gradient of `x`; for ReLU its output may stand in for it."""
    grad: Tensor
    if kind == "relu":
        grad = torch.ops.aten.threshold_backward(grad_y, x, 0)
    else:
        grad = torch.ops.aten.gelu_backward(grad_y, x, approximate="tanh")
    return grad


if triton is not None:

    @triton.jit
    def activated(value, KIND: tl.constexpr):
        """Does what `activation` does, within a kernel; NaN passes."""
        if KIND == "relu":
            return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            return value * _half_of_gelu(value)

    @triton.jit
    def before_activation(grad, value, KIND: tl.constexpr):
        """Does what `activation_backward` does, within a kernel; NaN passes."""
        if KIND == "relu":
            return tl.where(value <= 0, 0.0, grad)
        else:
            half = _half_of_gelu(value)
            # Of the argument of the logistic function.
            slope = 1.5957691216057308 * (1 + 0.134145 * value * value)
            return grad * (half + value * half * (1 - half) * slope)

    @triton.jit
    def _half_of_gelu(value):
        """Returns (1 + tanh(u)) / 2, which is the logistic function of 2u."""
        return tl.sigmoid(
            1.5957691216057308 * (value + 0.044715 * value * value * value)
        )
