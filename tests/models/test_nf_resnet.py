"""NF-ResNets have the published sizes, and refuse what they do not have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError
from dpsgd.models import build_model
from dpsgd.models.norm_free import NormFreeNetwork
from dpsgd.trees import num_elements

IMAGENET = (3, 224, 224)


def build(image_shape: tuple[int, int, int] = IMAGENET, **settings: Any) -> nn.Module:
    settings = {"depth": 50, "normalization": "none", **settings}
    config = ModelConfig(name="nf_resnet", **settings)
    with torch.device("meta"):
        return build_model(config, image_shape=image_shape, num_classes=1000)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (50, 25_557_048),
        (101, 44_549_193),
        (152, 60_192_858),
        (200, 64_673_898),
        (288, 146_460_552),
    ],
)
def test_number_of_parameters_is_the_published_one(depth: int, expected: int) -> None:
    model = build(depth=depth)

    assert num_elements(dict(model.named_parameters())) == expected


def test_settings_reach_the_network() -> None:
    model = build(skip_gain_init=1.0, stochastic_depth=0.1, compute_dtype="bfloat16")
    assert isinstance(model, NormFreeNetwork)
    blocks = [block for stage in model.stages for block in stage.children()]

    assert model.compute_dtype == torch.bfloat16
    assert model.draws_per_view == 16
    rates = [block.drop_rate for block in blocks]
    assert rates == pytest.approx([0.1 * index / 16 for index in range(16)])
    assert build().draws_per_view == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 34}, r"model\.depth=34: must be one of 50, 101, 152, 200, 288"),
        ({"variant": "F0"}, r"model\.variant=F0: nf_resnet has no such setting"),
        ({"width": 2}, r"model\.width=2: nf_resnet has no such setting"),
        ({"groups": 8}, r"model\.groups=8: nf_resnet has no such setting"),
        ({"order": "norm_activation"}, r"model\.order=norm_activation: nf_resnet has"),
        ({"normalization": "group_norm"}, r"normalization=group_norm: .*; set none"),
        ({"weight_standardization": False}, r"standardization=False: nf_resnet has no"),
        ({"image_shape": (3, 32, 31)}, r"needs images of 32 pixels a side.* 32x31;"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"model\.width=2.*\nmodel\.depth=34"):
        build(width=2, depth=34)


@pytest.mark.parametrize("name", ["wide_resnet", "convnet"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [("variant", "F0"), ("skip_gain_init", 1.0), ("stochastic_depth", 0.1)],
)
def test_other_networks_refuse_what_they_do_not_have(
    name: str, setting: str, value: Any
) -> None:
    config = ModelConfig(name=name, **{"depth": 4 if name == "convnet" else 16})
    config = replace(config, **{setting: value})

    with pytest.raises(ConfigError, match=rf"model\.{setting}={value}: {name} has no"):
        build_model(config, image_shape=(3, 32, 32), num_classes=10)
