"""Every setting of a network is used or refused: none is ignored in silence."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError
from dpsgd.models import MODELS, build_model

IMAGE_SHAPE = (3, 32, 32)
SETTINGS = [one.name for one in fields(ModelConfig)]
AROUND = {"name", "num_classes", "init_from", "init_weights"}  # of any network
FITTING: dict[str, dict[str, Any]] = {
    "convnet": {"depth": 2},
    "nf_resnet": {"depth": 50, "normalization": "none"},
    "nfnet": {"variant": "F0", "normalization": "none"},
    "wide_resnet": {"depth": 10},
}


class Watched:
    """Settings that note which of them are read."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._config, name)


def fitting(name: str) -> ModelConfig:
    return ModelConfig(name=name, **FITTING[name])


def build(config: ModelConfig) -> None:
    with torch.device("meta"):
        build_model(config, image_shape=IMAGE_SHAPE, num_classes=3)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_reads_the_settings_that_it_says_it_uses(name: str) -> None:
    architecture, config = MODELS[name], Watched(fitting(name))
    watched: Any = config
    assert architecture.faults(watched, IMAGE_SHAPE) == []
    with torch.device("meta"):
        architecture.build(watched, image_shape=IMAGE_SHAPE, num_classes=3)

    assert config.read - AROUND == {*architecture.uses}
    config.read.clear()
    assert architecture.title(watched)
    assert config.read <= {"name", *architecture.uses}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_used_or_refused(name: str, setting: str) -> None:
    config = replace(fitting(name), **{setting: "another"})
    if setting in {*AROUND, *MODELS[name].uses}:
        return
    told = f"model.{setting}=another: {name} has no such setting; remove it"
    with pytest.raises(ConfigError) as error:
        build(config)

    assert str(error.value) == told


@pytest.mark.parametrize("name", MODELS)
def test_a_setting_around_the_network_is_refused_by_none(name: str) -> None:
    around = {"num_classes": 7, "init_from": "weights.pt", "init_weights": "last"}

    build(replace(fitting(name), **around))
