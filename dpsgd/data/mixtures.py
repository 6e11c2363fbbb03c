"""Mixtures: views that are made of two other views of the same example."""

import numpy as np
import torch
from torch import Tensor

from dpsgd.data.fixed_views import FixedNumbers

__all__ = ["draw_mixtures", "mix_views"]


def draw_mixtures(
    rng: np.random.Generator | FixedNumbers,
    num_examples: int,
    *,
    num_views: int,
    num_mixed: int,
) -> Tensor:
    """Draws which two views of an example are mixed, and how.

    Equally many numbers are drawn an example, one after the other, so that appending
    one leaves the mixtures of those before it as they were.

    Args:
        rng: The stream `mixing` of this step, or what stands for it.
        num_examples: R >= 0, the size of the draw.
        num_views: Views V of each example, >= 2.
        num_mixed: Mixtures X of each example, >= 1.

    Returns:
        (R, X, 3) float64 on the CPU: which two different views, uniform over all pairs,
        and the weight of the first, uniform in [0, 1).

    Source: Bao et al. 2023 (arXiv:2311.01295), DP-Mix_Self, with uniform weights.
    """
    numbers = rng.random((num_examples, num_mixed, 3))
    first = np.floor(num_views * numbers[..., 0])
    others = np.floor((num_views - 1) * numbers[..., 1])
    second = others + (others >= first)  # any but the first
    return torch.from_numpy(np.stack([first, second, numbers[..., 2]], axis=-1))


def mix_views(views: Tensor, mixtures: Tensor) -> Tensor:
    """Appends mixtures of an example's views to them.

    Guarantees:
        The views of an example depend on that example alone, so that their mean
        gradient is clipped as one, as it is without mixtures.

    Args:
        views: (M, V, C, h, w) of M examples.
        mixtures: (M, X, 3) on the same device, as `draw_mixtures` returns them.

    Returns:
        (M, V + X, C, h, w) of the same type, its images channels-last in memory.
    """
    wide = torch.promote_types(views.dtype, torch.float32)
    views = views.permute(0, 1, 3, 4, 2)  # (M, V, h, w, C), as kernels lay them out
    rows = mixtures[..., :2].long()  # (M, X, 2)
    weights = mixtures[..., 2, None, None, None].to(wide)  # (M, X, 1, 1, 1)
    example = torch.arange(len(views), device=views.device)[:, None]
    first, second = views[example, rows[..., 0]], views[example, rows[..., 1]]
    mixed = torch.lerp(second.to(wide), first.to(wide), weights).to(views.dtype)
    return torch.cat([views, mixed], dim=1).permute(0, 1, 4, 2, 3)
