"""Wide residual networks without batch normalisation.

Source: Zagoruyko and Komodakis 2016 (arXiv:1605.07146), with the changes of De et al.
2022 (arXiv:2204.13650): group normalisation after the activation, weight
standardisation, and a projection in the first block of every stage.

A stride-2 convolution pads one pixel on each side, where the published JAX code pads
only after the last row and column; `model.stride_padding=same` does as it does.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from dpsgd.config import ModelConfig
from dpsgd.errors import fault
from dpsgd.kernels import position_mean
from dpsgd.models.architecture import Architecture, Network
from dpsgd.models.layers import (
    Addends,
    Conv2d,
    Linear,
    activate,
    activation_and_norm,
)
from dpsgd.models.settings import NORMED_SETTINGS

__all__ = ["WIDE_RESNET", "WideResNet"]

_STEM_CHANNELS = 16
_STAGE_CHANNELS = (16, 32, 64)
_STAGE_STRIDES = (1, 2, 2)

_Pair = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two 3x3 convolutions, each behind activation and norm, beside a shortcut.

    Args:
        in_channels: I.
        out_channels: O.
        stride: Of the first convolution and of the projection.
        projects: Whether the shortcut is a 1x1 convolution behind a norm of its own.
        build_activation: Builds activation and norm for a number of channels.
        conv: Builds a convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        projects: bool,
        build_activation: _Pair,
        conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.shortcut = nn.ModuleList()
        if projects:
            projection = conv(in_channels, out_channels, kernel_size=1, stride=stride)
            self.shortcut = nn.ModuleList([build_activation(in_channels), projection])
        self.residual = nn.ModuleList(
            [
                build_activation(in_channels),
                conv(in_channels, out_channels, kernel_size=3, stride=stride),
                build_activation(out_channels),
            ]
        )
        self.last = conv(out_channels, out_channels, kernel_size=3)

    def forward(self, x: Addends) -> Addends:
        """Maps (K, I, H, W) to (K, O, H/stride, W/stride)."""
        norm, first, second_norm = self.residual
        if self.shortcut:
            own_norm, project = self.shortcut
            (y, beside), _ = activate(x, norm, own_norm, keeps_sum=False)
            shortcut = project(beside)
        else:
            (y,), shortcut = activate(x, norm, keeps_sum=True)
        result: Addends = self.last(second_norm(first(y))).plus(shortcut)
        return result


class WideResNet(Network):
    """A Wide-ResNet of 6n + 4 layers for images of any size.

    Args:
        depth: Layers, 6n + 4.
        width: Channel multiplier.
        in_channels: Channels C of the images.
        num_classes: Outputs.
        build_activation: Builds activation and norm for a number of channels.
        standardized: Whether convolutions standardise their weights.
        stride_padding: Where stride-2 convolutions pad, as for `Conv2d`.
        compute_dtype: Type that images are cast to, and so of all activations.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        in_channels: int,
        num_classes: int,
        build_activation: _Pair,
        standardized: bool,
        stride_padding: str,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        conv = partial(Conv2d, standardized=standardized, stride_padding=stride_padding)
        self.compute_dtype = compute_dtype
        self.stem = conv(in_channels, _STEM_CHANNELS, kernel_size=3)
        channels = _STEM_CHANNELS
        stages = []
        for base, stride in zip(_STAGE_CHANNELS, _STAGE_STRIDES, strict=True):
            blocks = []
            for index in range((depth - 4) // 6):
                first = index == 0
                block = Block(
                    channels,
                    base * width,
                    stride=stride if first else 1,
                    projects=first,
                    build_activation=build_activation,
                    conv=conv,
                )
                blocks.append(block)
                channels = base * width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head_activation = build_activation(channels)
        self.classifier = Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (K, C, H, W) to logits (K, num_classes), float32 or wider."""
        x = self.stages(self.stem(x.to(self.compute_dtype)))
        x = self.head_activation(x)
        return self.classifier(position_mean(x))  # type: ignore[no-any-return]


def _build(
    config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int
) -> WideResNet:
    """Returns the Wide-ResNet that settings describe, for images of any size."""
    return WideResNet(
        depth=config.depth,
        width=config.width,
        in_channels=image_shape[0],
        num_classes=num_classes,
        build_activation=partial(activation_and_norm, config=config),
        standardized=config.weight_standardization,
        stride_padding=config.stride_padding,
        compute_dtype=getattr(torch, config.compute_dtype),
    )


def _faults(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns why settings do not fit the network; images of any size do."""
    faults = []
    if config.depth < 10 or (config.depth - 4) % 6:
        rule = "must be 6n + 4 with n >= 1"
        faults.append(fault("model.depth", config.depth, rule, "take 10, 16, 28 or 40"))
    if config.normalization == "group_norm" and _STEM_CHANNELS % config.groups:
        rule = f"must divide the stem's {_STEM_CHANNELS} channels"
        faults.append(fault("model.groups", config.groups, rule, "take 1 to 16"))
    return faults


def _title(config: ModelConfig) -> str:
    """Returns the network's name as papers write it."""
    return f"WRN-{config.depth}-{config.width}"


WIDE_RESNET: Final = Architecture(
    build=_build,
    uses=("depth", "width", *NORMED_SETTINGS),
    faults=_faults,
    title=_title,
)
