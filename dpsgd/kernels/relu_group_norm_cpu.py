"""ReLU and group normalisation of a sum on the CPU: a few images at a time.

On a CPU the time goes to passes over memory. Here all passes over a few images follow
each other, while these lie in the cache, and images stay channels-last, as convolutions
leave them. The norm forward is PyTorch's own; backward it has no gradients of scale and
shift for every image.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels.relu_group_norm_triton import Affine

__all__ = ["relu_group_norm_backward_cpu", "relu_group_norm_cpu"]

_ELEMENTS = 1 << 18  # of the images taken at a time: 1 MiB of a cache of 1 or 2


def relu_group_norm_cpu(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affines: tuple[Affine, ...],
    *,
    num_groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor, Tensor]:
    """Does what `relu_group_norm_forward` does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    layout = torch.channels_last
    outputs = tuple(torch.empty_like(x, memory_format=layout) for _ in affines)
    total = None if residual is None else torch.empty_like(x, memory_format=layout)
    mean, rstd = (x.new_empty(len(x), num_groups, dtype=wide) for _ in range(2))
    # Not every version of torch reads strides here.
    wide_affines = [
        (scale.to(wide).contiguous(), shift.to(wide).contiguous())
        for scale, shift in affines
    ]
    for few in _few_at_a_time(x):
        value = _biased(x[few], bias, wide)
        if residual is not None and total is not None:
            torch.add(value, residual[few].to(wide), out=total[few])
            value = total[few].to(wide)
        active = F.relu(value).contiguous(memory_format=layout)
        sizes = (len(active), active.shape[1], active[0, 0].numel(), num_groups)
        for output, (scale, shift) in zip(outputs, wide_affines, strict=True):
            output[few], mean[few], rstd[few] = torch.native_group_norm(
                active, scale, shift, *sizes, eps
            )
    return outputs, total, mean, rstd


def relu_group_norm_backward_cpu(
    total: Tensor,
    bias: Tensor | None,
    grads_y: tuple[Tensor, ...],
    grad_total: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scales: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Does what `relu_group_norm_backward` does."""
    wide, layout = mean.dtype, torch.channels_last
    grad_x = torch.empty_like(total, memory_format=layout)
    wide_scales = [scale.to(wide) for scale in scales]
    rows = []
    for few in _few_at_a_time(total):
        active = F.relu(_biased(total[few], bias, wide))
        grads = [grad[few].to(wide, memory_format=layout) for grad in grads_y]
        result, *of_affines = _norm_backward(
            active, grads, mean[few], rstd[few], wide_scales
        )
        written = grad_x[few] if total.dtype == wide else result
        torch.ops.aten.threshold_backward.grad_input(
            result, active, 0, grad_input=written
        )
        if grad_total is not None:
            written += grad_total[few]
        if total.dtype != wide:
            grad_x[few] = written
        rows.append((*of_affines, written.sum((2, 3))))
    columns = [torch.cat(parts) for parts in zip(*rows, strict=True)]  # (N, C) each
    *of_affines, grad_bias = columns
    count = len(scales)
    return grad_x, tuple(of_affines[:count]), tuple(of_affines[count:]), grad_bias


def _norm_backward(
    active: Tensor,
    grads: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    scales: list[Tensor],
) -> list[Tensor]:
    """Returns gradients of a norm's inputs (N, C, H, W), of scales and shifts (N, C).

    The first is linear in what was given and in what was normalised, with factors for
    each channel that follow from the gradients of shifts and scales.
    """
    center, spread = (_per_channel(one, active.shape[1]) for one in (mean, rstd))
    grad_shifts = [grad.sum((2, 3)) for grad in grads]
    grad_scales = [
        ((grad * active).sum((2, 3)) - center * shift) * spread
        for grad, shift in zip(grads, grad_shifts, strict=True)
    ]
    mean_grad, along = (
        _per_channel(_group_sums(rows, scales, mean.shape[1]), active.shape[1])
        for rows in (grad_shifts, grad_scales)
    )
    count = active[0].numel() // mean.shape[1]
    per_value = -spread.square() * along / count
    constant = -spread * mean_grad / count - per_value * center
    result = torch.addcmul(_of_images(constant), active, _of_images(per_value))
    for grad, scale in zip(grads, scales, strict=True):
        result.addcmul_(grad, _of_images(scale * spread))
    return [result, *grad_scales, *grad_shifts]


def _biased(images: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns images in a type, channels-last, with the bias if there is one."""
    images = images.to(dtype, memory_format=torch.channels_last)
    return images if bias is None else images + bias.to(dtype).view(-1, 1, 1)


def _few_at_a_time(images: Tensor) -> Iterator[slice]:
    """Yields slices of a few images each."""
    step = max(1, _ELEMENTS // images[0].numel())
    for start in range(0, len(images), step):
        yield slice(start, start + step)


def _group_sums(rows: list[Tensor], scales: list[Tensor], num_groups: int) -> Tensor:
    """Returns (N, groups) sums of (N, C) rows, each times its scale."""
    products = [row * scale for row, scale in zip(rows, scales, strict=True)]
    return torch.stack(products).sum(0).unflatten(1, (num_groups, -1)).sum(2)


def _per_channel(per_group: Tensor, channels: int) -> Tensor:
    """Returns (N, C) of (N, groups), the same for all channels of a group."""
    return per_group.repeat_interleave(channels // per_group.shape[1], dim=1)


def _of_images(per_channel: Tensor) -> Tensor:
    """Returns (N, C) as factors of images, (N, C, 1, 1)."""
    return per_channel[:, :, None, None]
