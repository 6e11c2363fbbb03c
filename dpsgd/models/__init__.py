"""Networks without batch normalisation, and the table of their names."""

from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError, did_you_mean, fault
from dpsgd.models.architecture import Architecture, Network
from dpsgd.models.compatibility import check_model
from dpsgd.models.convnet import CONVNET
from dpsgd.models.layers import initialize
from dpsgd.models.losses import classifier_loss, per_example_loss, per_user_loss
from dpsgd.models.nf_resnet import NF_RESNET
from dpsgd.models.nfnet import NFNET
from dpsgd.models.trainable import (
    CLASSIFIER,
    freeze,
    frozen_tensors,
    trainable_params,
)
from dpsgd.models.wide_resnet import WIDE_RESNET

__all__ = [
    "CLASSIFIER",
    "MODELS",
    "Architecture",
    "Network",
    "build_model",
    "check_model",
    "classifier_loss",
    "freeze",
    "frozen_tensors",
    "initialize",
    "per_example_loss",
    "per_user_loss",
    "trainable_params",
]


MODELS: dict[str, Architecture] = {
    "convnet": CONVNET,
    "nf_resnet": NF_RESNET,
    "nfnet": NFNET,
    "wide_resnet": WIDE_RESNET,
}
"""Networks by name; a new one is a file with an `Architecture`, and a line here."""


def build_model(
    config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int
) -> Network:
    """Builds the configured network, parameters undrawn.

    Args:
        config: Architecture.
        image_shape: (C, H, W) of one image.
        num_classes: Outputs, >= 2.

    Raises:
        ConfigError: The name is unknown, or the architecture refuses its settings; one
            line for each.
    """
    if config.name not in MODELS:
        otherwise = f"known are {', '.join(MODELS)}"
        remedy = did_you_mean(config.name, MODELS, otherwise=otherwise)
        raise ConfigError(fault("model.name", config.name, "unknown model", remedy))
    architecture = MODELS[config.name]
    faults = architecture.refusals(config, image_shape)
    if faults:
        raise ConfigError("\n".join(faults))
    return architecture.build(config, image_shape=image_shape, num_classes=num_classes)
