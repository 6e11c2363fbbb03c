"""Settings that a network cannot use, so that none is ignored silently."""

from dataclasses import fields

from dpsgd.config import ModelConfig
from dpsgd.errors import fault

__all__ = ["faults_of_norm_free", "faults_of_unused"]

_SMALLEST_SIDE = 32  # halved five times


def faults_of_unused(config: ModelConfig, *names: str) -> list[str]:
    """Returns a fault for each setting that is given and would change nothing.

    Args:
        config: Settings of the network.
        *names: Those that its architecture does not have.
    """
    defaults = {one.name: one.default for one in fields(config)}
    rule, remedy = f"{config.name} has no such setting", "remove it"
    return [
        fault(f"model.{name}", getattr(config, name), rule, remedy)
        for name in names
        if getattr(config, name) != defaults[name]
    ]


def faults_of_norm_free(
    config: ModelConfig, image_shape: tuple[int, int, int]
) -> list[str]:
    """Returns the faults of settings for any network without normalisation.

    Args:
        config: Settings of the network.
        image_shape: (C, H, W) of one image.
    """
    faults = faults_of_unused(config, "width", "groups", "order")
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
