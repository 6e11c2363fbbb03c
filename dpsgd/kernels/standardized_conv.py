"""Convolution with standardised weights, and fast per-sample gradients under vmap.

Under vmap(grad) the examples are folded into the images of one ordinary convolution,
forward and for the input's gradient; the weight gradients of all examples come from
one kernel, and the Jacobian of the standardisation is applied to them in one pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dpsgd.kernels.conv_weight_grad import conv_weight_grad
from dpsgd.kernels.dispatch import require_unbatched, runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = [
    "standardized_conv2d",
    "standardized_weight",
    "unstandardize_reference",
    "unstandardize_triton",
]

_EPS = 1e-4
_ELEMENTS = 4096


def standardized_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns weights with zero mean and norm 1 in every output channel.

    $u = (w - \mu) \cdot r$ with $r = (\max(\sum (w - \mu)^2, 10^{-4}))^{-1/2}$; with
    biased variance the sum is variance times fan-in.

    Args:
        weight: (O, KH, KW, I) weights.

    Returns:
        (O, KH, KW, I) unit weights; (O,) factor r; (O,) 1 where r follows from the
        weights, 0 where the bound took its place.

    Source: Qiao et al. 2019 (arXiv:1903.10520); scaled by fan-in as in Brock et al.
    2021 (arXiv:2101.08692).
    """
    fan_in = math.prod(weight.shape[1:])
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    squared_norm = variance * fan_in
    factor = torch.rsqrt(squared_norm.clamp(min=_EPS))
    follows = (squared_norm >= _EPS).to(weight.dtype)
    return (weight - mean) * factor, factor.flatten(), follows.flatten()


def standardized_conv2d(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor,
    *,
    stride: int,
    padding: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolves with standardised weights, differentiably, also under vmap(grad).

    Args:
        x: (N, I, H, W) images, whose type is the type of the arithmetic.
        weight: (O, KH, KW, I) float32 parameters, before standardisation.
        gain: (O,) float32 scale of each output channel; None takes the weights as
            they are.
        bias: (O,) float32.
        stride: Step between output positions.
        padding: Zeros around the input.
        residual: (N, O, HO, WO) added to the result, of the type of `x`.

    Returns:
        (N, O, HO, WO) of the type of `x`.
    """
    has_kernel = weight.shape[1] in (1, 3) and x.dtype != torch.float64
    if has_kernel and runs_on_triton(x):
        y: Tensor = _Convolution.apply(
            x, residual, weight, gain, bias, stride, padding
        )[0]
        return y
    if gain is not None:
        weight = standardized_weight(weight)[0] * gain.view(-1, 1, 1, 1)
    # Contiguous, or it would turn all activations channels-last, which the grouped
    # convolution that vmap makes of the weight gradient copies back.
    kernel = weight.permute(0, 3, 1, 2).to(x.dtype).contiguous()  # (O, I, KH, KW)
    y = F.conv2d(x, kernel, bias.to(x.dtype), stride=stride, padding=padding)
    return y if residual is None else y + residual


class _Convolution(Function):
    """Forward: one ordinary convolution over the images of all examples."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor,
        stride: int,
        padding: int,
    ) -> tuple[Tensor, ...]:
        if gain is None:
            unit, factor, follows = (weight.new_empty(0) for _ in range(3))
            effective = weight
        else:
            unit, factor, follows = standardized_weight(weight)
            effective = unit * gain.view(-1, 1, 1, 1)
        kernel = effective.to(x.dtype).permute(0, 3, 1, 2)  # channels-last strides
        y = F.conv2d(x, kernel, stride=stride, padding=padding)
        add_bias = _add_bias_triton_ if runs_on_triton(y) else _add_bias_reference_
        add_bias(y, bias, residual)
        return y, kernel, unit, factor, follows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, _, gain, _, ctx.stride, ctx.padding = inputs
        ctx.has_residual = residual is not None
        _, kernel, unit, factor, follows = output
        ctx.mark_non_differentiable(kernel, unit, factor, follows)
        ctx.has_gain = gain is not None
        gain = gain if ctx.has_gain else factor
        ctx.save_for_backward(x, kernel, unit, factor, follows, gain)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, kernel, unit, factor, follows, gain = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _InputGrad.apply(
                grad_y, kernel, x.shape[-2:], ctx.stride, ctx.padding
            )
        grads = _WeightGrad.apply(
            x,
            grad_y,
            unit,
            factor,
            follows,
            gain,
            ctx.stride,
            ctx.padding,
            kernel.shape[-1],
            ctx.has_gain,
        )
        grad_gain = grads[1] if ctx.has_gain else None
        grad_residual = grad_y if ctx.has_residual else None
        return grad_x, grad_residual, grads[0], grad_gain, grads[2], None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        residual: Tensor | None,
        *rest: Any,
    ) -> tuple[Any, Any]:
        require_unbatched("standardized_conv2d", in_dims[2:])
        x = x.movedim(in_dims[0], 0)
        if residual is not None:
            residual = residual.movedim(in_dims[1], 0).flatten(0, 1)
        y, *others = _Convolution.apply(x.flatten(0, 1), residual, *rest)
        y = y.unflatten(0, x.shape[:2])
        return (y, *others), (0, None, None, None, None)


class _InputGrad(Function):
    """Backward to the images: one ordinary transposed convolution."""

    @staticmethod
    def forward(
        grad_y: Tensor, kernel: Tensor, size: torch.Size, stride: int, padding: int
    ) -> Tensor:
        shape = (grad_y.shape[0], kernel.shape[1], *size)
        like_x = torch.empty(
            shape,
            device=grad_y.device,
            dtype=grad_y.dtype,
            memory_format=torch.channels_last,
        )
        grad_x: Tensor = torch.ops.aten.convolution_backward(
            grad_y,
            like_x,
            kernel,
            None,
            [stride, stride],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, False, False],
        )[0]
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], grad_y: Tensor, kernel: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        require_unbatched("standardized_conv2d", in_dims[1:])
        grad_y = grad_y.movedim(in_dims[0], 0)
        grad_x = _InputGrad.apply(grad_y.flatten(0, 1), kernel, *rest)
        return grad_x.unflatten(0, grad_y.shape[:2]), 0


class _WeightGrad(Function):
    """Backward to the parameters: of one example, or of all with the vmap rule."""

    @staticmethod
    def forward(x: Tensor, grad_y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        grads = _per_sample(x[None], grad_y[None], *rest)
        return tuple(grad[0] for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, grad_y: Tensor, *rest: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        require_unbatched("standardized_conv2d", in_dims[2:])
        x, grad_y = x.movedim(in_dims[0], 0), grad_y.movedim(in_dims[1], 0)
        return _per_sample(x, grad_y, *rest), (0, 0, 0)


def _add_bias_reference_(y: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """Adds a bias a channel, and a tensor, to images in place, in PyTorch."""
    y.add_(bias.to(y.dtype).view(-1, 1, 1))
    if residual is not None:
        y.add_(residual)


def _add_bias_triton_(y: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """Does what `_add_bias_reference_` does, in one Triton launch."""
    assert y.is_contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    grid = (triton.cdiv(y.numel(), _ELEMENTS),)
    _add_bias_kernel[grid](
        y,
        bias,
        y if residual is None else residual,
        y.numel(),
        C=y.shape[1],
        HAS_RESIDUAL=residual is not None,
        BLOCK=_ELEMENTS,
        num_warps=4,
    )


def _per_sample(
    x: Tensor,
    grad_y: Tensor,
    unit: Tensor,
    factor: Tensor,
    follows: Tensor,
    gain: Tensor,
    stride: int,
    padding: int,
    kernel_size: int,
    has_gain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (M, ...) gradients of weights, gain and bias."""
    weight_grads, bias_grads = conv_weight_grad(
        x, grad_y, kernel_size=kernel_size, stride=stride, padding=padding
    )
    if not has_gain:
        return weight_grads, bias_grads, bias_grads
    on_triton = runs_on_triton(weight_grads)
    run = unstandardize_triton if on_triton else unstandardize_reference
    gain_grads = run(weight_grads, unit, factor, follows, gain)
    return weight_grads, gain_grads, bias_grads


def unstandardize_reference(
    weight_grads: Tensor, unit: Tensor, factor: Tensor, follows: Tensor, gain: Tensor
) -> Tensor:
    r"""Turns gradients of effective weights into those of raw ones, in place.

    With $g$ the gradient of $\hat w = \gamma u$, F the fan-in and a = `follows`:
    $\partial w = \gamma r (g - \bar g - a \, u \langle u, g \rangle)$ and
    $\partial \gamma = \langle u, g \rangle$.

    Args:
        weight_grads: (M, O, KH, KW, I) gradients g, overwritten.
        unit: (O, KH, KW, I) unit weights u.
        factor: (O,) r.
        follows: (O,) a, 0 or 1.
        gain: (O,) gamma.

    Returns:
        (M, O) gradients of the gain.
    """
    flat = weight_grads.flatten(2)  # (M, O, F)
    direction = unit.flatten(1)  # (O, F)
    along = torch.einsum("mof,of->mo", flat, direction)
    mean = flat.mean(2, keepdim=True)
    projected = flat - mean - (follows * along)[:, :, None] * direction
    flat.copy_(projected * (gain * factor)[:, None])
    return along


def unstandardize_triton(
    weight_grads: Tensor, unit: Tensor, factor: Tensor, follows: Tensor, gain: Tensor
) -> Tensor:
    """Does what `unstandardize_reference` does, in one Triton launch."""
    num_examples, out_channels = weight_grads.shape[:2]
    fan_in = unit[0].numel()
    gain_grads = torch.empty(
        num_examples, out_channels, device=unit.device, dtype=torch.float32
    )
    _unstandardize_kernel[(num_examples * out_channels,)](
        weight_grads,
        unit,
        factor,
        follows,
        gain,
        gain_grads,
        out_channels,
        fan_in,
        BLOCK=triton.next_power_of_2(fan_in),
        num_warps=4 if fan_in <= 1024 else 8,
    )
    return gain_grads


if triton is not None:

    @triton.jit
    def _add_bias_kernel(
        y,
        bias,
        residual,
        num_elements,
        C: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program: BLOCK elements of channels-last images."""
        element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = element < num_elements
        value = tl.load(y + element, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(bias + element % C, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            value += tl.load(residual + element, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + element, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _unstandardize_kernel(
        grads,
        unit,
        factor,
        follows,
        gain,
        gain_grads,
        out_channels,
        fan_in,
        BLOCK: tl.constexpr,
    ):
        """One program: one output channel of one example."""
        row = tl.program_id(0).to(tl.int64)
        channel = row % out_channels
        weight = tl.arange(0, BLOCK)
        inside = weight < fan_in
        grad = tl.load(grads + row * fan_in + weight, mask=inside, other=0.0)
        direction = tl.load(unit + channel * fan_in + weight, mask=inside, other=0.0)
        along = tl.sum(grad * direction)
        mean = tl.sum(grad) / fan_in
        slope = tl.load(gain + channel) * tl.load(factor + channel)
        part = along * tl.load(follows + channel)
        result = (grad - mean - direction * part) * slope
        tl.store(grads + row * fan_in + weight, result, mask=inside)
        tl.store(gain_grads + row, along)
