"""NFNets: wider, grouped, with squeeze-excite and scaled GELU, without normalisation.

Source: Brock et al. 2021 (arXiv:2102.06171). timm's `dm_nfnet_f0` differs: its GELU is
exact, here and as published its tanh form; its standardisation adds 1e-5 to the
variance, here the squared norm is at least 1e-4. It pads as `model.stride_padding=same`
does. Shortcuts are averaged over 2x2 pixels, so variances are below the predicted ones
where images are not smooth.
"""

from typing import Final

from dpsgd.config import ModelConfig
from dpsgd.errors import fault
from dpsgd.models.architecture import Architecture
from dpsgd.models.norm_free import GELU, NormFreeDesign, NormFreeNetwork
from dpsgd.models.settings import NORM_FREE_SETTINGS, faults_of_norm_free

__all__ = ["NFNET", "nfnet_design"]

_F0_DEPTHS = (1, 2, 6, 3)
_VARIANTS = ("F0", "F1", "F2", "F3", "F4", "F5", "F6")


def nfnet_design(variant: str) -> NormFreeDesign:
    """Returns the architecture of a published variant: F0 to F6."""
    times = 1 + _VARIANTS.index(variant)
    return NormFreeDesign(
        depths=tuple(times * depth for depth in _F0_DEPTHS),
        widths=(256, 512, 1536, 1536),
        stem=((16, 3, 2), (32, 3, 1), (64, 3, 1), (128, 3, 2)),
        stem_pools=False,
        bottleneck=0.5,
        num_spatial=2,
        group_width=128,
        squeeze_excite=0.5,
        pools_shortcut=True,
        head_channels=3072,
        activation=GELU,
    )


def _build(
    config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int
) -> NormFreeNetwork:
    """Returns the NFNet that settings describe."""
    assert config.variant is not None  # its faults say so
    return NormFreeNetwork.configured(
        nfnet_design(config.variant),
        config,
        image_shape=image_shape,
        num_classes=num_classes,
    )


def _faults(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns why settings do not fit images of some (C, H, W), or the network."""
    faults = faults_of_norm_free(config, image_shape)
    if config.variant not in _VARIANTS:
        rule = f"must be one of {', '.join(_VARIANTS)}"
        if config.variant is None:
            rule = "an nfnet has a variant in place of a depth"
        remedy = f"take one of {_VARIANTS[0]} to {_VARIANTS[-1]}"
        faults.append(fault("model.variant", config.variant, rule, remedy))
    return faults


def _title(config: ModelConfig) -> str:
    """Returns the network's name as papers write it."""
    return f"NFNet-{config.variant}"


NFNET: Final = Architecture(
    build=_build,
    uses=("variant", *NORM_FREE_SETTINGS),
    faults=_faults,
    title=_title,
)
