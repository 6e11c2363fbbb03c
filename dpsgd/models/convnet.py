"""A plain convolutional network for small images: few parameters, so little noise.

The noise of a step has one independent coordinate a parameter, so on a small data set
a small network learns more for the same epsilon (Tramer and Boneh 2021,
arXiv:2011.11660).
"""

from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from dpsgd.config import ModelConfig
from dpsgd.errors import fault
from dpsgd.models.architecture import Architecture, Network
from dpsgd.models.layers import Conv2d, Linear, activation_and_norm
from dpsgd.models.settings import NORMED_SETTINGS

__all__ = ["CONVNET", "ConvNet"]

_FIRST_CHANNELS = 16


class ConvNet(Network):
    """3x3 convolutions, each but the first halving the image, then a classifier.

    Args:
        config: Depth (convolutions), width, normalisation and compute type.
        image_shape: (C, H, W) of one image.
        num_classes: Outputs.
    """

    takes_one_size: ClassVar[bool] = True  # the classifier sees every pixel

    def __init__(
        self,
        config: ModelConfig,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.compute_dtype: torch.dtype = getattr(torch, config.compute_dtype)
        in_channels, height, width = image_shape
        layers: list[nn.Module] = []
        for index in range(config.depth):
            channels = _FIRST_CHANNELS * config.width * 2**index
            stride = 1 if index == 0 else 2
            layers += [
                Conv2d(
                    in_channels,
                    channels,
                    kernel_size=3,
                    stride=stride,
                    standardized=config.weight_standardization,
                    stride_padding=config.stride_padding,
                ),
                activation_and_norm(channels, config),
            ]
            height, width = -(-height // stride), -(-width // stride)
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.classifier = Linear(in_channels * height * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (K, C, H, W) to logits (K, num_classes), float32 or wider."""
        x = self.features(x.to(self.compute_dtype)).flatten(1)
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.classifier(x.to(wide))  # type: ignore[no-any-return]


def _faults(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns why settings do not fit images of some (C, H, W), or the network."""
    faults = []
    most = min(image_shape[1:]).bit_length()
    if config.depth > most:
        rule = f"must be at most {most} for images of {image_shape[1:]} pixels"
        faults.append(fault("model.depth", config.depth, rule, "lower it"))
    channels = _FIRST_CHANNELS * config.width
    if config.normalization == "group_norm" and channels % config.groups:
        rule = f"must divide the first layer's {channels} channels"
        faults.append(fault("model.groups", config.groups, rule, "take 1, 4 or 16"))
    return faults


CONVNET: Final = Architecture(
    build=ConvNet, uses=("depth", "width", *NORMED_SETTINGS), faults=_faults
)
