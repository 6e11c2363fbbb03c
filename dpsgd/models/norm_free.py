r"""Residual networks without normalisation: signals keep their variance by design.

Block l maps $x_{l+1} = s(x_l) + \alpha \, g_l \, f_l(\beta_l \, a(x_l))$, with s the
identity or a projection, f a branch that keeps variance, a learned skip gain g, and
$\beta_l = 1 / \sqrt{v_l}$ for the variance v that x is predicted to have if g = 1:
$v_{l+1} = v_l + \alpha^2$, and $1 + \alpha^2$ where s projects. Activations are scaled
to unit variance for unit normal inputs; their constants and beta multiply the weights
of the convolutions that read them, and take no pass over the images.

Source: Brock, De and Smith 2021 (arXiv:2101.08692), Brock et al. 2021
(arXiv:2102.06171), and their code, https://github.com/google-deepmind/deepmind-research,
folder nfnets. Otherwise here: the dropout of NFNets before the classifier is left out;
squeeze-excite weights have variance 1/I, 0.77/I there; strides and max pooling pad as
`model.stride_padding` says, SAME there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.config import ModelConfig
from dpsgd.kernels import Activation, position_mean, residual_activation
from dpsgd.models.architecture import Network
from dpsgd.models.layers import Addends, Conv2d, Layer, Linear

__all__ = [
    "GELU",
    "RELU",
    "NormFreeBlock",
    "NormFreeDesign",
    "NormFreeNetwork",
    "ScaledActivation",
    "SkipGain",
    "SqueezeExcite",
    "expected_variances",
]

_CLASSIFIER_STD = 0.01


class ScaledActivation(NamedTuple):
    """An activation, and what brings its output for unit normals to unit variance.

    Attributes:
        kind: The activation, not scaled.
        constant: Factor that the weights after it take over.
    """

    kind: Activation
    constant: float


RELU = ScaledActivation("relu", 1.7139588594436646)
GELU = ScaledActivation("gelu", 1.7015043497085571)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormFreeDesign:
    """An architecture; its blocks keep, halve, halve and halve the size of images.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        stem: (channels, kernel size, stride) of each convolution before the stages.
        stem_pools: Whether a 3x3 max pooling of stride 2 follows the stem.
        bottleneck: Channels within a branch, as a share of the stage's.
        num_spatial: 3x3 convolutions in a branch; the first has the stride.
        group_width: Channels of each of their groups; None takes one group.
        squeeze_excite: Hidden width of squeeze-excite, as a share; None for none.
        pools_shortcut: Whether a shortcut is halved by 2x2 average pooling, or else by
            the stride of its 1x1 convolution.
        head_channels: Channels of a last 1x1 convolution; None for none.
        activation: Everywhere.
        alpha: Share of the variance that a branch adds is its square.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: tuple[tuple[int, int, int], ...]
    stem_pools: bool
    bottleneck: float
    num_spatial: int
    group_width: int | None
    squeeze_excite: float | None
    pools_shortcut: bool
    head_channels: int | None
    activation: ScaledActivation
    alpha: float = 0.2


def expected_variances(
    depths: tuple[int, ...], *, alpha: float
) -> tuple[tuple[float, ...], ...]:
    """Returns the predicted variance of each block's output, stage by stage.

    Every stage begins with a projection, which resets the variance to 1; skip gains
    are taken to be 1.

    >>> expected_variances((2, 1), alpha=0.5)
    ((1.25, 1.5), (1.25,))
    """
    square = alpha**2
    return tuple(
        tuple(1 + (index + 1) * square for index in range(depth)) for depth in depths
    )


class SkipGain(Layer):
    """A learned factor, the same for all channels.

    Args:
        start: Its first value.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self._start = start
        self.value = nn.Parameter(torch.empty(()))

    def initialize(self, rng: np.random.Generator) -> None:
        """Sets the first value."""
        del rng
        with torch.no_grad():
            self.value.fill_(self._start)


class SqueezeExcite(nn.Module):
    """Weighs the channels of each image by what it holds of all of them.

    Args:
        channels: C.
        hidden: Width between the two linear layers.
    """

    def __init__(self, channels: int, *, hidden: int) -> None:
        super().__init__()
        self.reduce = Linear(channels, hidden)
        self.expand = Linear(hidden, channels)

    def forward(self, x: Addends) -> Tensor:
        """Maps images (K, C, H, W) to weights (K, C) in (0, 2), float32 or wider."""
        hidden = F.relu(self.reduce(position_mean(x.images, *x.biases)))
        return 2 * torch.sigmoid(self.expand(hidden))  # 2: about 1 when drawn


class NormFreeBlock(nn.Module):
    """A bottleneck branch beside a shortcut, each behind one scaled activation.

    Attributes:
        alpha: Factor of the branch.
        beta: 1 over the standard deviation that the input is predicted to have.
        expected_variance: That the output is predicted to have, if the skip gain is 1.
        drop_rate: Share of views for which the branch is left out in training.

    Args:
        in_channels: I.
        out_channels: O.
        design: Of the network.
        stride: Of the first 3x3 convolution and of the shortcut.
        projects: Whether the shortcut has a 1x1 convolution.
        expected_variance: Of the input.
        skip_gain_init: First value of the skip gain.
        drop_rate: As the attribute.
        conv: Builds a convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        design: NormFreeDesign,
        stride: int,
        projects: bool,
        expected_variance: float,
        skip_gain_init: float,
        drop_rate: float,
        conv: Callable[..., Conv2d],
    ) -> None:
        super().__init__()
        self.alpha = design.alpha
        self.beta = expected_variance**-0.5
        carried = 1.0 if projects else expected_variance
        self.expected_variance = carried + self.alpha**2
        self.drop_rate = drop_rate
        self._activation, constant = design.activation
        self._pools = design.pools_shortcut and stride > 1
        first = partial(conv, in_channels, kernel_size=1, scale=constant * self.beta)
        self.projection = None
        if projects:
            step = 1 if self._pools else stride
            self.projection = first(out_channels, stride=step)
        inner = int(design.bottleneck * out_channels)
        groups = inner // (design.group_width or inner)
        spatial = partial(
            conv, inner, inner, kernel_size=3, groups=groups, scale=constant
        )
        self.branch = nn.ModuleList(
            [
                first(inner),
                spatial(stride=stride),
                *(spatial() for _ in range(design.num_spatial - 1)),
                conv(inner, out_channels, kernel_size=1, scale=constant),
            ]
        )
        self.squeeze_excite = None
        if design.squeeze_excite is not None:
            hidden = int(design.squeeze_excite * out_channels)
            self.squeeze_excite = SqueezeExcite(out_channels, hidden=hidden)
        self.skip_gain = SkipGain(skip_gain_init)

    def forward(
        self, x: Tensor, active: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Maps images (K, I, H, W) and their activation to those of the next block.

        Args:
            x: Images; a block that projects does not read them.
            active: Their activation, not scaled.
            uniforms: (K,) in [0, 1): the branch is left out where below `drop_rate`;
                None leaves it out nowhere.

        Returns:
            Both (K, O, H/stride, W/stride).
        """
        shortcut = self._shortcut(x, active)
        first, *others = self.branch
        y = first(active)
        for conv in others:
            y = conv(y.activated(self._activation))
        return residual_activation(
            shortcut.images,
            y.images,
            shortcut_bias=shortcut.biases[0] if shortcut.biases else None,
            bias=y.biases[0],
            scale=self._scale(y, uniforms),
            kind=self._activation,
        )

    def _shortcut(self, x: Tensor, active: Tensor) -> Addends:
        """Returns the images, or their projected activation, (K, O, ...)."""
        if self.projection is None:
            return Addends(x)
        if self._pools:
            active = F.avg_pool2d(active, 2, 2, ceil_mode=True, count_include_pad=False)
        shortcut: Addends = self.projection(active)
        return shortcut

    def _scale(self, y: Addends, uniforms: Tensor | None) -> Tensor:
        """Returns (1 or K, 1 or O), by which the branch is multiplied."""
        scale = (self.alpha * self.skip_gain.value).view(1, 1)
        if self.squeeze_excite is not None:
            scale = scale * self.squeeze_excite(y)  # (K, O)
        if uniforms is not None and self.drop_rate > 0:
            scale = scale * (uniforms >= self.drop_rate)[:, None]
        return scale


class NormFreeNetwork(Network):
    """A network of such blocks, for images of any size.

    Attributes:
        draws_per_view: Uniform numbers that stochastic depth takes for each view: one
            a block, 0 without it.

    Args:
        design: Architecture.
        in_channels: Channels C of the images.
        num_classes: Outputs.
        skip_gain_init: First value of all skip gains.
        stochastic_depth: Rate r in [0, 1): block b of n is left out at b r / n.
        stride_padding: Where strides pad, as for `Conv2d`.
        compute_dtype: Type that images are cast to, and so of all activations.
    """

    def __init__(
        self,
        design: NormFreeDesign,
        *,
        in_channels: int,
        num_classes: int,
        skip_gain_init: float = 0.0,
        stochastic_depth: float = 0.0,
        stride_padding: str = "symmetric",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.design = design
        self.compute_dtype = compute_dtype
        self._pads_as_jax = stride_padding == "same"
        num_blocks = sum(design.depths)
        self.draws_per_view = num_blocks if stochastic_depth > 0 else 0
        conv = partial(Conv2d, stride_padding=stride_padding)
        self.stem, channels = self._stem(in_channels, conv)
        block = partial(
            NormFreeBlock, design=design, skip_gain_init=skip_gain_init, conv=conv
        )
        variances = expected_variances(design.depths, alpha=design.alpha)
        variance, index = 1.0, 0
        self.stages = nn.ModuleList()
        for stage, width in enumerate(design.widths):
            blocks = nn.ModuleList()
            for position, after in enumerate(variances[stage]):
                is_first = position == 0
                blocks.append(
                    block(
                        channels,
                        width,
                        stride=2 if is_first and stage > 0 else 1,
                        projects=is_first,
                        expected_variance=variance,
                        drop_rate=stochastic_depth * index / num_blocks,
                    )
                )
                channels, variance, index = width, after, index + 1
            self.stages.append(blocks)
        self.head_conv = None
        if design.head_channels is not None:
            self.head_conv = conv(channels, design.head_channels, kernel_size=1)
            channels = design.head_channels
        self.classifier = Linear(channels, num_classes, std=_CLASSIFIER_STD)

    @classmethod
    def configured(
        cls,
        design: NormFreeDesign,
        config: ModelConfig,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> Self:
        """Returns a network of a design with all that is configured beside it."""
        return cls(
            design,
            in_channels=image_shape[0],
            num_classes=num_classes,
            skip_gain_init=config.skip_gain_init,
            stochastic_depth=config.stochastic_depth,
            stride_padding=config.stride_padding,
            compute_dtype=getattr(torch, config.compute_dtype),
        )

    def _stem(
        self, channels: int, conv: Callable[..., Conv2d]
    ) -> tuple[nn.ModuleList, int]:
        """Returns the first convolutions, and the channels of their output."""
        layers, scale = nn.ModuleList(), 1.0
        for out_channels, kernel_size, stride in self.design.stem:
            layers.append(
                conv(
                    channels,
                    out_channels,
                    kernel_size=kernel_size,
                    stride=stride,
                    scale=scale,
                )
            )
            channels, scale = out_channels, self.design.activation.constant
        return layers, channels

    def forward(self, x: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Maps images (K, C, H, W) to logits (K, num_classes), float32 or wider.

        Args:
            x: Images.
            uniforms: (K, draws_per_view) in [0, 1), independent of all else, from
                which stochastic depth follows; None leaves no branch out, as in
                evaluation.
        """
        kind, constant = self.design.activation
        first, *others = self.stem
        addends = first(x.to(self.compute_dtype))
        for conv in others:
            addends = conv(addends.activated(kind))
        if self.design.stem_pools:  # a maximum is that of the sum, without its bias
            addends = addends._replace(images=self._max_pooled(addends.images))
        x = active = addends.activated(kind)  # the first block projects, and reads no x
        blocks = [block for stage in self.stages for block in stage.children()]
        for index, block in enumerate(blocks):
            draws = None if uniforms is None else uniforms[:, index]
            x, active = block(x, active, draws)
        if self.head_conv is not None:
            active = self.head_conv(x).activated(kind)
        features = constant * position_mean(active)
        return self.classifier(features)  # type: ignore[no-any-return]

    def _max_pooled(self, x: Tensor) -> Tensor:
        """Returns the 3x3 maxima of stride 2, padded as convolutions are."""
        if not self._pads_as_jax:
            return F.max_pool2d(x, 3, stride=2, padding=1)
        # JAX pads an odd side by one at both ends, an even one by one at its end.
        padding = (x.shape[-2] % 2, x.shape[-1] % 2)
        return F.max_pool2d(x, 3, stride=2, padding=padding, ceil_mode=True)
