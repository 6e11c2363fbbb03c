"""NFNets have the published sizes, and refuse what they do not have."""

from typing import Any

import pytest
import torch
from torch import nn

from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError
from dpsgd.models import build_model
from dpsgd.models.norm_free import NormFreeNetwork
from dpsgd.trees import num_elements


def build(
    image_shape: tuple[int, int, int] = (3, 192, 192), **settings: Any
) -> nn.Module:
    config = ModelConfig(name="nfnet", **{"normalization": "none", **settings})
    with torch.device("meta"):
        return build_model(config, image_shape=image_shape, num_classes=1000)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("F0", 71_489_284),
        ("F1", 132_634_256),
        ("F2", 193_779_228),
        ("F3", 254_924_200),
        ("F4", 316_069_172),
        ("F5", 377_214_144),
        ("F6", 438_359_116),
    ],
)
def test_number_of_parameters_is_the_published_one(variant: str, expected: int) -> None:
    model = build(variant=variant)

    assert num_elements(dict(model.named_parameters())) == expected


def test_settings_reach_the_network() -> None:
    model = build(variant="F1", stochastic_depth=0.1)

    assert isinstance(model, NormFreeNetwork)
    assert model.draws_per_view == 24
    last = list(model.stages[-1].children())[-1]
    assert last.drop_rate == pytest.approx(0.1 * 23 / 24)
    # 768 channels within the branch, 128 to a group.
    assert [conv.geometry.groups for conv in last.branch] == [1, 6, 6, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"model\.variant=null: an nfnet has a variant.*; take one of F0 to F6"),
        ({"variant": "F7"}, r"model\.variant=F7: must be one of F0, .*, F6; take one"),
        ({"variant": "F0", "depth": 50}, r"model\.depth=50: nfnet has no such setting"),
        ({"variant": "F0", "normalization": "group_norm"}, r"group_norm: nfnet normal"),
        ({"variant": "F0", "image_shape": (3, 8, 8)}, "these are 8x8"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)
