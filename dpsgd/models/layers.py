"""Layers without batch statistics: each output depends on one example alone.

Parameters are float32 masters; a layer computes in the type of its input, so that the
compute type is chosen once, where the network receives its images.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from dpsgd.config import ModelConfig
from dpsgd.errors import fault
from dpsgd.kernels import (
    Activation,
    ConvGeometry,
    activation,
    bias_activation,
    group_norm,
    linear,
    standardized_conv2d,
    sum_relu_group_norm,
)

__all__ = [
    "ActivationNorm",
    "Addends",
    "Conv2d",
    "Layer",
    "Linear",
    "Relu",
    "activate",
    "activation_and_norm",
    "initialize",
]

_GROUP_NORM_EPS = 1e-5
_TRUNCATION = 2.0
# Standard deviation of a unit normal truncated to +-2, by which haiku's initialisers
# divide so that the truncated draw keeps the variance that was asked for.
_TRUNCATED_STD = 0.87962566


class Addends(NamedTuple):
    """A sum of images that is not formed yet: whatever reads it first forms it.

    So a bias or a residual takes no pass over the images of its own.

    Attributes:
        images: (K, C, H, W).
        biases: (C,) parameters added to every image, two at most.
        residual: (K, C, H, W) added, or None.
    """

    images: Tensor
    biases: tuple[Tensor, ...] = ()
    residual: Tensor | None = None

    def plus(self, other: "Addends") -> "Addends":
        """Returns the sum of both; one of them at most has a residual."""
        assert other.residual is None
        assert self.residual is None
        biases = (*self.biases, *other.biases)
        return Addends(self.images, biases, other.images)

    def total(self) -> Tensor:
        """Forms the sum."""
        total = self.images
        for bias in self.biases:
            total = total + bias.to(total.dtype).view(-1, 1, 1)
        return total if self.residual is None else total + self.residual

    def activated(self, kind: Activation) -> Tensor:
        """Returns an activation of the sum; of images and one bias in one pass."""
        if self.residual is None and len(self.biases) == 1:
            return bias_activation(self.images, self.biases[0], kind)
        return activation(self.total(), kind)


class Layer(nn.Module, ABC):
    """A layer with parameters that it draws from a given stream."""

    @abstractmethod
    def initialize(self, rng: np.random.Generator) -> None:
        """Draws the parameters, float32, the same on every device."""


def initialize(model: nn.Module, rng: np.random.Generator) -> None:
    """Draws all parameters of a model, in the order in which modules are registered.

    Args:
        model: Network built of `Layer` and of modules without own parameters.
        rng: Generator of the `init` stream.

    Raises:
        ValueError: A module owns parameters and is not a `Layer`.
    """
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            module.initialize(rng)
        elif any(True for _ in module.parameters(recurse=False)):
            rule = "owns parameters and cannot draw them"
            remedy = "derive it from dpsgd.models.layers.Layer"
            raise ValueError(fault(name, type(module).__name__, rule, remedy))


class Conv2d(Layer):
    """Convolution with bias, half-kernel padding and, on request, standardised weights.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: Side of the square kernel, odd.
        stride: Step between output positions.
        groups: Parts into which channels are divided; each sees its own inputs only.
        standardized: Standardise the weights and learn a gain a output channel.
        stride_padding: Of a convolution with a stride: `symmetric`, half a kernel on
            every side, or `same`, what JAX's SAME adds.
        scale: Constant that multiplies standardised weights, where a scaled activation
            would take a pass over the images.
    """

    gain: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        standardized: bool = True,
        stride_padding: str = "symmetric",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.pads_as_jax = stride > 1 and stride_padding == "same"
        padding = 0 if self.pads_as_jax else kernel_size // 2
        self.geometry = ConvGeometry(kernel_size, stride, padding, groups)
        # Input channels last: the layout of the fastest per-sample gradients.
        shape = (out_channels, kernel_size, kernel_size, in_channels // groups)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.register_parameter(
            "gain", nn.Parameter(torch.empty(out_channels)) if standardized else None
        )

    def initialize(self, rng: np.random.Generator) -> None:
        """Draws weights ~ N(0, 1/fan_in); gain 1, bias 0."""
        fan_in = math.prod(self.weight.shape[1:])
        weight = rng.standard_normal(tuple(self.weight.shape)) / math.sqrt(fan_in)
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(weight))
            self.bias.zero_()
            if self.gain is not None:
                self.gain.fill_(1.0)

    def forward(self, x: Tensor) -> Addends:
        """Maps (K, I, H, W) to (K, O, H/stride, W/stride), in the type of `x`."""
        if self.pads_as_jax:
            x = self._padded(x)
        images = standardized_conv2d(
            x, self.weight, self.gain, self.geometry, scale=self.scale
        )
        return Addends(images, (self.bias,))

    def _padded(self, x: Tensor) -> Tensor:
        """Adds the zeros that the last output position lacks, the odd one at the end.

        Source: SAME of jax.lax.padtype_to_pads.
        """
        pads = []
        kernel_size, stride, *_ = self.geometry
        for size in (x.shape[-1], x.shape[-2]):
            covered = (-(-size // stride) - 1) * stride + kernel_size
            missing = max(0, covered - size)
            pads += [missing // 2, missing - missing // 2]
        return F.pad(x, pads)


class ActivationNorm(Layer):
    """ReLU and group normalisation (Wu and He 2018), statistics in float32 or wider.

    Args:
        num_channels: C.
        num_groups: Groups that share mean and variance; divides `num_channels`.
        activation_first: Whether ReLU comes before the normalisation.
    """

    def __init__(
        self, num_channels: int, *, num_groups: int, activation_first: bool
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.activation_first = activation_first
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))

    def initialize(self, rng: np.random.Generator) -> None:
        """Sets scale 1 and shift 0."""
        del rng
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()

    def forward(self, x: Addends) -> Tensor:
        """Maps the sum (K, C, H, W) to the same shape, each image by itself."""
        if self.activation_first:
            return _fused((self,), x)[0][0]
        total = x.total()
        wide = torch.promote_types(total.dtype, torch.float32)
        scale, shift = self.weight.to(wide), self.bias.to(wide)
        y = group_norm(total.to(wide), self.num_groups, scale, shift, _GROUP_NORM_EPS)
        return F.relu(y).to(total.dtype)


class Relu(nn.Module):
    """ReLU without normalisation."""

    def forward(self, x: Addends) -> Tensor:
        """Maps the sum (K, C, H, W) to the same shape."""
        return x.activated("relu")


class Linear(Layer):
    """A linear layer, such as a classifier, in float32 or wider.

    Args:
        in_features: I.
        out_features: O.
        std: Standard deviation of drawn weights; None truncates at variance 1/I.
    """

    def __init__(
        self, in_features: int, out_features: int, *, std: float | None = None
    ) -> None:
        super().__init__()
        self._std = std
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def initialize(self, rng: np.random.Generator) -> None:
        """Draws weights of the given std, or truncated of variance 1/I; bias 0."""
        shape = tuple(self.weight.shape)
        if self._std is not None:
            weight = self._std * rng.standard_normal(shape)
        else:
            low, high = ndtr(-_TRUNCATION), ndtr(_TRUNCATION)
            unit = ndtri(rng.uniform(low, high, size=shape))
            weight = unit / (_TRUNCATED_STD * math.sqrt(shape[1]))
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(weight))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (K, I) to (K, O), in the type of `x`."""
        return linear(x, self.weight, self.bias)


def activation_and_norm(channels: int, config: ModelConfig) -> nn.Module:
    """Returns ReLU and the configured norm, in the configured order.

    Args:
        channels: Channels C of the images.
        config: Normalisation, its groups and its order.
    """
    if config.normalization == "none":
        return Relu()
    return ActivationNorm(
        channels,
        num_groups=config.groups,
        activation_first=config.order == "activation_norm",
    )


def activate(
    x: Addends, *activations: nn.Module, keeps_sum: bool
) -> tuple[tuple[Tensor, ...], Addends]:
    """Returns what one or two activations make of one sum, reading it once.

    Args:
        x: The sum.
        *activations: As `activation_and_norm` returns them, for the same channels.
        keeps_sum: Whether the sum is used again.

    Returns:
        (K, C, H, W) for each; and the sum, formed if it is kept.
    """
    norms = [
        one
        for one in activations
        if isinstance(one, ActivationNorm) and one.activation_first
    ]
    if len(norms) == len(activations) and (x.residual is not None or not keeps_sum):
        outputs, total = _fused(tuple(norms), x)
        return outputs, x if total is None else Addends(total)
    x = Addends(x.total())
    return tuple(one(x) for one in activations), x


def _fused(
    norms: tuple[ActivationNorm, ...], x: Addends
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Returns norms of the ReLU of a sum, and the sum if it has a residual."""
    return sum_relu_group_norm(
        x.images,
        x.biases,
        x.residual,
        tuple((norm.weight, norm.bias) for norm in norms),
        num_groups=norms[0].num_groups,
        eps=_GROUP_NORM_EPS,
    )
