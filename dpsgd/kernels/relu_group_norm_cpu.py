"""ReLU and group normalisation of a sum on the CPU: a few images at a time.

On a CPU the time goes to passes over memory. Here all passes over a few images follow
each other, while these lie in the cache, and images stay channels-last, as convolutions
leave them: each is a matrix of positions and channels, (P, C).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.kernels.relu_group_norm_triton import Affine

__all__ = ["relu_group_norm_backward_cpu", "relu_group_norm_cpu"]

_ELEMENTS = 1 << 17  # of the images taken at a time: 0.5 MiB of a cache of 1 or 2


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
    images = _as_matrices(x)  # (N, P, C)
    addends = None if residual is None else _as_matrices(residual)
    outputs = [torch.empty_like(images) for _ in affines]
    total = None if residual is None else torch.empty_like(images)
    mean, rstd = (x.new_empty(len(x), num_groups, dtype=wide) for _ in range(2))
    for few in _few_at_a_time(images):
        value = images[few].to(wide)
        if bias is not None:
            value = value + bias.to(wide)
        if total is not None and addends is not None:
            torch.add(value, addends[few].to(wide), out=total[few])
            value = total[few].to(wide)
        active = F.relu(value)
        mean[few] = _group_means(active.mean(1), num_groups)
        centred = active.sub_(_per_channel(mean[few], active))
        variance = _group_means(centred.square().mean(1), num_groups)
        rstd[few] = torch.rsqrt(variance + eps)
        spread = _per_channel(rstd[few], active)
        for output, (scale, shift) in zip(outputs, affines, strict=True):
            slope = scale.to(wide) * spread
            torch.addcmul(shift.to(wide), centred, slope, out=output[few])
    sums = None if total is None else _as_images(total, x)
    return tuple(_as_images(one, x) for one in outputs), sums, mean, rstd


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
    images = _as_matrices(total)  # (N, P, C)
    grads = [_as_matrices(grad) for grad in grads_y]
    others = None if grad_total is None else _as_matrices(grad_total)
    wide_scales = [scale.to(mean.dtype) for scale in scales]
    grad_x = torch.empty_like(images)
    rows = []
    for few in _few_at_a_time(images):
        value = images[few].to(mean.dtype)
        if bias is not None:
            value = value + bias.to(mean.dtype)
        few_grads = [grad[few].to(mean.dtype) for grad in grads]
        active = F.relu(value)
        result, *of_affines = _norm_backward(
            active, few_grads, mean[few], rstd[few], wide_scales
        )
        result = torch.ops.aten.threshold_backward(result, active, 0)
        if others is not None:
            result += others[few]
        grad_x[few] = result
        rows.append((*of_affines, result.sum(1)))
    columns = [torch.cat(parts) for parts in zip(*rows, strict=True)]  # (N, C) each
    *of_affines, grad_bias = columns
    grad_scales, grad_shifts = of_affines[: len(grads)], of_affines[len(grads) :]
    return (
        _as_images(grad_x, total),
        tuple(grad_scales),
        tuple(grad_shifts),
        grad_bias,
    )


def _norm_backward(
    active: Tensor,
    grads: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    scales: list[Tensor],
) -> list[Tensor]:
    """Returns gradients of a norm's inputs (N, P, C), of its scales and shifts (N, C).

    The means over a group of the scaled gradient, and of its product with the
    normalised images, are formed from the gradients of shifts and scales.
    """
    spread = _per_channel(rstd, active)
    normalized = (active - _per_channel(mean, active)).mul_(spread)
    grad_scales = [(grad * normalized).sum(1) for grad in grads]
    grad_shifts = [grad.sum(1) for grad in grads]
    means, alongs = (
        torch.stack([row * scale for row, scale in zip(rows, scales, strict=True)])
        .sum(0)
        .div(active.shape[1])
        for rows in (grad_shifts, grad_scales)
    )
    mean_grad, along = (
        _per_channel(_group_means(one, mean.shape[1]), active)
        for one in (means, alongs)
    )
    grad_active = torch.addcmul(-mean_grad * spread, normalized, -along * spread)
    for grad, scale in zip(grads, scales, strict=True):
        grad_active.addcmul_(grad, scale * spread)
    return [grad_active, *grad_scales, *grad_shifts]


def _as_matrices(images: Tensor) -> Tensor:
    """Returns (N, P, C) of images; a copy only if they are not channels-last."""
    laid_out = images.contiguous(memory_format=torch.channels_last)
    return laid_out.permute(0, 2, 3, 1).flatten(1, 2)


def _as_images(matrices: Tensor, like: Tensor) -> Tensor:
    """Returns (N, P, C) as (N, C, H, W), channels-last."""
    return matrices.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _few_at_a_time(matrices: Tensor) -> Iterator[slice]:
    """Yields slices of a few images each."""
    step = max(1, _ELEMENTS // matrices[0].numel())
    for start in range(0, len(matrices), step):
        yield slice(start, start + step)


def _group_means(per_channel: Tensor, num_groups: int) -> Tensor:
    """Returns (N, groups) means of (N, C)."""
    return per_channel.unflatten(1, (num_groups, -1)).mean(2)


def _per_channel(per_group: Tensor, matrices: Tensor) -> Tensor:
    """Returns (N, 1, C) of (N, groups), the same for all channels of a group."""
    group_size = matrices.shape[2] // per_group.shape[1]
    return per_group.repeat_interleave(group_size, dim=1)[:, None]
