"""Convolution with standardised weights, and fast per-sample gradients under vmap.

Under vmap(grad) the examples are folded into the images of one ordinary convolution,
forward and for the input's gradient; the weight gradients of all examples come from
one kernel, and the Jacobian of the standardisation is applied to them in one pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.conv_weight_grad import conv_weight_grad
from dpsgd.kernels.dispatch import fold, require_unbatched, runs_on_triton
from dpsgd.kernels.geometry import ConvGeometry
from dpsgd.kernels.tape import ConvRecord, active_tape
from dpsgd.kernels.weight_standardization import (
    Standardization,
    standardize,
    standardize_reference,
    unstandardize_,
)

__all__ = ["standardized_conv2d"]


def standardized_conv2d(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    geometry: ConvGeometry,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Convolves with standardised weights, differentiably, also under vmap(grad).

    Args:
        x: (N, I, H, W) images, whose type is the type of the arithmetic.
        weight: (O, KH, KW, I / groups) float32 parameter, before standardisation.
        gain: (O,) float32 parameter, scale of each output channel; None takes the
            weights as they are.
        geometry: Of the convolution.
        scale: Constant > 0 by which standardised weights are multiplied.

    Returns:
        (N, O, HO, WO) of the type of `x`.
    """
    assert gain is not None or scale == 1.0
    if active_tape() is not None or (runs_on_triton(x) and x.dtype != torch.float64):
        y: Tensor = _Convolution.apply(x, weight, gain, geometry, scale)[0]
        return y
    if gain is not None:
        weight, _ = standardize_reference(weight, gain, weight.dtype, scale=scale)
    # All contiguous, or it would turn activations channels-last, which the grouped
    # convolution that vmap makes of the weight gradient copies back.
    kernel = weight.permute(0, 3, 1, 2).to(x.dtype).contiguous()  # (O, I, KH, KW)
    _, stride, padding, groups = geometry
    return F.conv2d(
        x.contiguous(), kernel, stride=stride, padding=padding, groups=groups
    )


class _Convolution(Function):
    """Forward: one ordinary convolution over the images of all examples."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        geometry: ConvGeometry,
        scale: float,
    ) -> tuple[Tensor, ...]:
        if gain is None:
            unit, factor, follows = (weight.new_empty(0) for _ in range(3))
            effective = weight.to(x.dtype)
        else:
            effective, how = standardize(weight, gain, x.dtype, scale=scale)
            unit, factor, follows, _ = how
        kernel = effective.permute(0, 3, 1, 2)  # channels-last strides
        _, stride, padding, groups = geometry
        y = F.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)
        return y, kernel, unit, factor, follows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, gain, ctx.geometry, _ = inputs
        _, kernel, unit, factor, follows = output
        ctx.set_materialize_grads(False)  # zeros for what has no gradient
        ctx.mark_non_differentiable(kernel, unit, factor, follows)
        ctx.save_for_backward(x, kernel, unit, factor, follows, gain, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return None, None, None, None, None
        x, kernel, unit, factor, follows, gain, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _InputGrad.apply(grad_y, kernel, x.shape[-2:], ctx.geometry)
        if not weight.requires_grad and (gain is None or not gain.requires_grad):
            return grad_x, None, None, None, None
        standardization = None
        if gain is not None:
            standardization = Standardization(unit, factor, follows, gain)
        tape = active_tape()
        if tape is not None:
            record = ConvRecord(weight, x, grad_y, ctx.geometry, standardization)
            tape.records.append(record)
            return grad_x, None, None, None, None
        grads = _WeightGrad.apply(x, grad_y, standardization, ctx.geometry)
        return grad_x, grads[0], grads[1] if gain is not None else None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        geometry: ConvGeometry,
        scale: float,
    ) -> tuple[Any, Any]:
        require_unbatched("standardized_conv2d", in_dims[1:3])
        images = fold(x, in_dims[0], info.batch_size)
        y, *others = _Convolution.apply(images, weight, gain, geometry, scale)
        y = y.unflatten(0, (info.batch_size, -1))
        return (y, *others), (0, None, None, None, None)


class _InputGrad(Function):
    """Backward to the images: one ordinary transposed convolution."""

    @staticmethod
    def forward(
        grad_y: Tensor, kernel: Tensor, size: torch.Size, geometry: ConvGeometry
    ) -> Tensor:
        shape = (grad_y.shape[0], kernel.shape[1] * geometry.groups, *size)
        like_x = torch.empty(
            shape,
            device=grad_y.device,
            dtype=grad_y.dtype,
            memory_format=torch.channels_last,
        )
        grad_x, _ = _ordinary_grads(grad_y, like_x, kernel, geometry, of_images=True)
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], grad_y: Tensor, kernel: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        require_unbatched("standardized_conv2d", in_dims[1:2])
        images = fold(grad_y, in_dims[0], info.batch_size)
        grad_x = _InputGrad.apply(images, kernel, *rest)
        return grad_x.unflatten(0, (info.batch_size, -1)), 0


class _WeightGrad(Function):
    """Backward to the parameters: of all images, or of each example under vmap."""

    @staticmethod
    def forward(
        x: Tensor,
        grad_y: Tensor,
        standardization: Standardization | None,
        geometry: ConvGeometry,
    ) -> tuple[Tensor, Tensor]:
        # Images that are summed anyway: the kernel would give them to few programs.
        size = geometry.kernel_size
        shape = (grad_y.shape[1], x.shape[1] // geometry.groups, size, size)
        kernel = torch.empty(shape, device=x.device, dtype=x.dtype)
        _, grad = _ordinary_grads(grad_y, x, kernel, geometry, of_images=False)
        grad = grad.permute(0, 2, 3, 1).contiguous()
        grad = grad.to(torch.promote_types(x.dtype, torch.float32))
        grads, of_gain = _of_parameters(grad[None], standardization)
        return grads[0], of_gain[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        grad_y: Tensor,
        standardization: Standardization | None,
        geometry: ConvGeometry,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x, grad_y = (
            fold(one, dim, info.batch_size).unflatten(0, (info.batch_size, -1))
            for one, dim in ((x, in_dims[0]), (grad_y, in_dims[1]))
        )
        grads = conv_weight_grad(x, grad_y, geometry)
        return _of_parameters(grads, standardization), (0, 0)


def _of_parameters(
    grads: Tensor, standardization: Standardization | None
) -> tuple[Tensor, Tensor]:
    """Returns (M, ...) gradients of weights and gain from those of the weights used."""
    if standardization is None:
        return grads, grads.new_empty(len(grads))
    return grads, unstandardize_(grads, standardization)


def _ordinary_grads(
    grad_y: Tensor,
    x: Tensor,
    kernel: Tensor,
    geometry: ConvGeometry,
    *,
    of_images: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the images, or else that of the kernel."""
    _, stride, padding, groups = geometry
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        *(grad_y, x, kernel, None, [stride, stride], [padding, padding]),
        *([1, 1], False, [0, 0], groups, [of_images, not of_images, False]),
    )
    return grads[0], grads[1]
