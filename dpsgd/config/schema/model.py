"""Settings of the network, and of what is trained of it."""

from dataclasses import dataclass
from typing import Literal

from dpsgd.config.rules import Fraction, NonNegative, PositiveInt

__all__ = ["FinetuneConfig", "ModelConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "wide_resnet"
    """Registered architecture."""

    depth: PositiveInt = 16
    """Number of layers: 6n + 4 for a Wide-ResNet, convolutions for a convnet, 50, 101,
    152, 200 or 288 for an NF-ResNet."""

    variant: str | None = None
    """Size of a network whose sizes have names: F0 to F6 for an NFNet; null for all
    others."""

    width: PositiveInt = 4
    """Channel multiplier: stages of a Wide-ResNet have 16, 32 and 64 times it, layers
    of a convnet 16, 32, 64 and so on."""

    normalization: Literal["group_norm", "none"] = "group_norm"
    """Normalisation within one example; batch normalisation mixes examples. NF-ResNets
    and NFNets have `none`."""

    groups: PositiveInt = 16
    """Groups of the group normalisation."""

    order: Literal["activation_norm", "norm_activation"] = "activation_norm"
    """ReLU before or after normalisation; the paper's is ReLU first."""

    weight_standardization: bool = True
    """Whether convolutions standardise their weights (Qiao et al. 2019)."""

    skip_gain_init: NonNegative = 0.0
    """Where the factor that an NF-ResNet or NFNet learns for each residual branch
    starts, >= 0: 0 as published, 1 for training from scratch with privacy."""

    stochastic_depth: Fraction = 0.0
    """Rate in [0, 1) at which the last residual branch of an NF-ResNet or NFNet is left
    out for a view, in training alone; it rises linearly from 0 at the first."""

    num_classes: PositiveInt | None = None
    """Outputs of the classifier; null takes the classes that the data set declares."""

    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of activations. Parameters, norms, sums and noise are float32 or wider."""

    stride_padding: Literal["symmetric", "same"] = "symmetric"
    """Where a convolution with a stride pads: half a kernel on every side, or, as JAX's
    SAME, no more than the stride needs and the odd pixel last. Weights that were
    trained with one are worth less with the other."""

    init_from: str | None = None
    """Weights to start from, public by your declaration: a run directory, a
    .safetensors, .pt, .pth or .npz file, torchvision:NAME or timm:NAME. The guarantee
    does not cover the data that they were trained on."""

    init_weights: Literal["auto", "ema", "last"] = "auto"
    """Which weights of a run to take; `auto` takes the average if it keeps one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """What is trained of a network that starts from given weights."""

    train: str = "all"
    """`all`, `classifier`, `norm_and_classifier`, or a regular expression that the
    whole name of a parameter must match. The others stay as they are, bit for bit:
    they have no gradient, no norm and no noise."""

    classifier: Literal["initialize", "zero", "load"] = "initialize"
    """The classifier of a network with `model.init_from`: drawn as from scratch, set
    to zero, or loaded with the rest."""
