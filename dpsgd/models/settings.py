"""Settings that networks of one kind use, whichever they are."""

from typing import Final

from dpsgd.config import ModelConfig
from dpsgd.errors import fault

__all__ = ["NORMED_SETTINGS", "NORM_FREE_SETTINGS", "faults_of_norm_free"]

_SMALLEST_SIDE = 32  # halved five times

NORMED_SETTINGS: Final = (
    "normalization",
    "groups",
    "order",
    "weight_standardization",
    "compute_dtype",
    "stride_padding",
)
"""What networks of convolutions behind activation and norm use besides their size."""

NORM_FREE_SETTINGS: Final = (
    "normalization",
    "weight_standardization",
    "skip_gain_init",
    "stochastic_depth",
    "compute_dtype",
    "stride_padding",
)
"""What networks without norms use, if only to refuse all but one value."""


def faults_of_norm_free(
    config: ModelConfig, image_shape: tuple[int, int, int]
) -> list[str]:
    """Returns the faults of settings for any network without normalisation.

    Args:
        config: Settings of the network.
        image_shape: (C, H, W) of one image.
    """
    faults = []
    if config.normalization != "none":
        rule = f"{config.name} normalises nothing"
        faults.append(
            fault("model.normalization", config.normalization, rule, "set none")
        )
    if not config.weight_standardization:
        rule = f"{config.name} has no other means to keep variances"
        faults.append(fault("model.weight_standardization", False, rule, "remove it"))
    if min(image_shape[1:]) < _SMALLEST_SIDE:
        height, width = image_shape[1:]
        rule = (
            f"needs images of {_SMALLEST_SIDE} pixels a side, these are "
            f"{height}x{width}"
        )
        faults.append(fault("model.name", config.name, rule, "take wide_resnet"))
    return faults
