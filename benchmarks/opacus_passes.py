"""One pass of Opacus, for the throughput table: hooks, and its ghost clipping.

Opacus has no sampler for layers with standardised weights, so its network is the same
Wide-ResNet of plain convolutions, which is less work than ours. It knows no views: the
per-sample gradients of an example's views are added up before the norm is taken, and
its ghost clipping, which never has them, is for one view alone. Images are not laid out
channels-last: Opacus 1.6 then returns other gradients of convolutions, without a word.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ghost", "hooks", "plain_wide_resnet"]

_GROUPS = 16
Pass = Callable[[], Any]


class _Block(nn.Module):
    """A block of `dpsgd.models.wide_resnet` in torch.nn alone."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_activation(in_channels),
            _conv(in_channels, out_channels, stride=stride),
            *_activation(out_channels),
            _conv(out_channels, out_channels),
        )
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride)
            self.shortcut = nn.Sequential(*_activation(in_channels), projection)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, I, H, W) to (N, O, H / stride, W / stride)."""
        return self.residual(x) + self.shortcut(x)


def _conv(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def _activation(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.ReLU(), nn.GroupNorm(_GROUPS, channels)


def plain_wide_resnet(
    depth: int, width: int, *, in_channels: int, num_classes: int
) -> nn.Module:
    """Returns a Wide-ResNet whose weights are not standardised, in torch.nn alone."""
    channels = [16, *(base * width for base in (16, 32, 64))]
    blocks: list[nn.Module] = []
    for stage, (before, after) in enumerate(pairwise(channels)):
        blocks.append(_Block(before, after, stride=1 if stage == 0 else 2))
        blocks += [_Block(after, after, stride=1) for _ in range((depth - 4) // 6 - 1)]
    return nn.Sequential(
        _conv(in_channels, channels[0]),
        *blocks,
        *_activation(channels[-1]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels[-1], num_classes),
    )


def hooks(model: nn.Module, images: Tensor, labels: Tensor) -> Pass:
    """Returns a pass that stores per-sample gradients, clips and adds them up.

    Args:
        model: Network of torch.nn layers.
        images: (M, K, C, H, W).
        labels: (M,).
    """
    from opacus.grad_sample import GradSampleModule

    num_examples, num_views = images.shape[:2]
    wrapped = GradSampleModule(model, loss_reduction="sum")
    flat, targets = _flat(images, labels)

    def run() -> dict[str, Tensor]:
        wrapped.zero_grad(set_to_none=True)
        with _autocast(images):
            loss = F.cross_entropy(wrapped(flat), targets, reduction="sum")
        (loss / num_views).backward()
        rows = {
            name: leaf.grad_sample.view(num_examples, num_views, -1).sum(1)
            for name, leaf in model.named_parameters()
        }
        squares = [leaf.float().square().sum(1) for leaf in rows.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (1 / norms).clamp(max=1)
        return {name: factors.to(leaf.dtype) @ leaf for name, leaf in rows.items()}

    return run


def ghost(model: nn.Module, images: Tensor, labels: Tensor) -> Pass:
    """Returns a pass of norms without gradients, then one of reweighted losses.

    Args:
        model: Network of torch.nn layers.
        images: (M, 1, C, H, W).
        labels: (M,).

    Raises:
        ValueError: There is more than one view.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    if images.shape[1] != 1:
        message = f"views={images.shape[1]}: Opacus clips every view by itself; give 1"
        raise ValueError(message)
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )
    flat, targets = _flat(images, labels)

    def run() -> dict[str, Tensor]:
        wrapped.zero_grad(set_to_none=True)
        with _autocast(images):
            losses = F.cross_entropy(wrapped(flat), targets, reduction="none")
        losses.sum().backward(retain_graph=True)
        wrapped.zero_grad(set_to_none=True)
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
        wrapped.enable_hooks()
        return {name: leaf.grad for name, leaf in model.named_parameters()}

    return run


def _flat(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns images (M * K, C, H, W), float32, and a label for each."""
    flat = images.flatten(0, 1).float().contiguous()
    return flat, labels.repeat_interleave(images.shape[1])


def _autocast(images: Tensor) -> torch.autocast:
    """Computes in the type of the images."""
    half = images.dtype != torch.float32
    return torch.autocast(images.device.type, dtype=images.dtype, enabled=half)
