"""NF-ResNets: ResNets of scaled ReLU and standardised weights, without normalisation.

Source: Brock, De and Smith 2021 (arXiv:2101.08692). timm's `nf_resnet50` differs: its
shortcuts are halved by average pooling, here by the stride of their 1x1 convolution as
published; it has no skip gains; its standardisation adds 1e-5 to the variance, here
the squared norm is at least 1e-4.
"""

from typing import Final

from dpsgd.config import ModelConfig
from dpsgd.errors import fault
from dpsgd.models.architecture import Architecture
from dpsgd.models.norm_free import RELU, NormFreeDesign, NormFreeNetwork
from dpsgd.models.settings import NORM_FREE_SETTINGS, faults_of_norm_free

__all__ = ["NF_RESNET", "nf_resnet_design"]

_DEPTHS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
}


def nf_resnet_design(depth: int) -> NormFreeDesign:
    """Returns the architecture of a published depth: 50, 101, 152, 200 or 288."""
    return NormFreeDesign(
        depths=_DEPTHS[depth],
        widths=(256, 512, 1024, 2048),
        stem=((64, 7, 2),),
        stem_pools=True,
        bottleneck=0.25,
        num_spatial=1,
        group_width=None,
        squeeze_excite=None,
        pools_shortcut=False,
        head_channels=None,
        activation=RELU,
    )


def _build(
    config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int
) -> NormFreeNetwork:
    """Returns the NF-ResNet that settings describe."""
    return NormFreeNetwork.configured(
        nf_resnet_design(config.depth),
        config,
        image_shape=image_shape,
        num_classes=num_classes,
    )


def _faults(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns why settings do not fit images of some (C, H, W), or the network."""
    faults = faults_of_norm_free(config, image_shape)
    if config.depth not in _DEPTHS:
        rule = f"must be one of {', '.join(map(str, _DEPTHS))}"
        faults.append(fault("model.depth", config.depth, rule, "take one of them"))
    return faults


def _title(config: ModelConfig) -> str:
    """Returns the network's name as papers write it."""
    return f"NF-ResNet-{config.depth}"


NF_RESNET: Final = Architecture(
    build=_build,
    uses=("depth", *NORM_FREE_SETTINGS),
    faults=_faults,
    title=_title,
)
