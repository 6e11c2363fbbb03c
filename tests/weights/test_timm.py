"""timm's networks with our names and layout give what they give there."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import small_settings
from torch import Tensor, nn

from dpsgd.config import Config, parse_config
from dpsgd.errors import ConfigError
from dpsgd.models import build_model
from dpsgd.models.nf_resnet import nf_resnet_design
from dpsgd.models.norm_free import RELU, NormFreeNetwork
from dpsgd.trees import Params
from dpsgd.weights import fit
from dpsgd.weights.sources import Weights
from dpsgd.weights.timm import from_timm_nfnet, with_our_standardization

timm = pytest.importorskip("timm", reason="needs timm, of the extra dev")

CLASSES = 5
NFNET = {
    "model.name": "nfnet",
    "model.depth": 16,
    "model.width": 4,
    "model.normalization": "none",
    "model.variant": "F0",
    "model.stride_padding": "same",
    "model.init_from": "timm:dm_nfnet_f0",
}


def timms(name: str) -> nn.Module:
    """A network whose branches count, with other values than at the start."""
    model: nn.Module = timm.create_model(name, num_classes=CLASSES).eval()
    for leaf_name, leaf in model.named_parameters():
        if leaf_name.endswith(("gain", "bias")):
            leaf.data += 0.5 * torch.rand_like(leaf)
    return model


def settings(**changes: Any) -> Config:
    named = {f"model.{name}": value for name, value in changes.items()}
    return parse_config(small_settings({**NFNET, **named}))


def without_values(config: Config) -> nn.Module:
    with torch.device("meta"):
        return build_model(config.model, image_shape=(3, 64, 64), num_classes=CLASSES)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tanh_gelu(x: Tensor, inplace: bool = False) -> Tensor:
    return F.gelu(x, approximate="tanh")


def test_an_nfnet_agrees_but_for_the_form_of_gelu() -> None:
    theirs, ours = timms("dm_nfnet_f0"), without_values(settings())
    ours.load_state_dict(from_timm_nfnet(theirs.state_dict()), assign=True)
    x = images(1, 3, 70, 64)  # 35 rows after the first stride: an odd side
    with torch.no_grad():
        found, exact = ours(x), theirs(x)
        for module in theirs.modules():
            if hasattr(module, "act_fn"):
                module.act_fn = tanh_gelu
        expected = theirs(x)
    size = float(expected.abs().max())

    assert float(expected.std()) > 0.1 * size
    # Some 60 layers of float32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * size)
    # The two forms differ by up to 5e-4 of a unit, in 50 layers.
    torch.testing.assert_close(found, exact, rtol=0, atol=0.005 * size)


def test_every_tensor_of_an_nfnet_has_a_place() -> None:
    with torch.device("meta"):
        state = timm.create_model("dm_nfnet_f1", num_classes=CLASSES).state_dict()
    own = without_values(settings(variant="F1")).state_dict()
    mapped = from_timm_nfnet(state)

    assert {name: leaf.shape for name, leaf in mapped.items()} == {
        name: leaf.shape for name, leaf in own.items()
    }


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"variant": "F1"}, r"model\.variant=F1: the weights are of F0"),
        (
            {"stride_padding": "symmetric"},
            r"model\.stride_padding=symmetric: the weights are of same",
        ),
    ],
    ids=str,
)
def test_an_nfnet_that_computes_otherwise_is_refused(
    changes: dict[str, Any], rule: str
) -> None:
    config = settings(**changes)
    name = "timm:dm_nfnet_f0"
    weights = Weights(source=name, tensors={}, naming=name)

    with pytest.raises(ConfigError, match=rule):
        fit(weights, without_values(config), config)


def from_timm_nf_resnet(state: Params) -> Params:
    """Its tensors under our names; constants that it keeps elsewhere are moved.

    There the weights of every convolution are multiplied by the activation's constant;
    here those that an activation stands before, and features, but not the stem's.
    """
    found = {}
    for name, leaf in state.items():
        module, _, kind = name.rpartition(".")
        module = module.replace("stem.conv", "stem.0").replace("head.fc", "classifier")
        module = module.replace("downsample.conv", "projection")
        for index in range(3):
            module = module.replace(f"conv{index + 1}", f"branch.{index}")
        if kind == "gain":
            leaf = with_our_standardization(leaf, state[f"{name[:-4]}weight"])
        if leaf.ndim == 4:
            leaf = leaf.permute(0, 2, 3, 1)  # (O, I, KH, KW) -> (O, KH, KW, I)
        if name == "stem.conv.gain":
            leaf = leaf * RELU.constant
        if name == "head.fc.weight":
            leaf = leaf / RELU.constant
        found[f"{module}.{kind}"] = leaf
        if name.endswith("conv3.gain"):
            block = module.removesuffix(".branch.2")
            found[f"{block}.skip_gain.value"] = leaf.new_ones(())
    return found


def test_an_nf_resnet_agrees_but_for_the_pooling_of_shortcuts() -> None:
    theirs = timms("nf_resnet50").double()
    state = from_timm_nf_resnet(theirs.state_dict())
    design = nf_resnet_design(50)
    x = images(1, 3, 62, 64).double()
    outputs = []
    for one in (design, replace(design, pools_shortcut=True)):
        with torch.device("meta"):
            ours = NormFreeNetwork(
                one, in_channels=3, num_classes=CLASSES, compute_dtype=torch.float64
            )
        ours.load_state_dict(state, assign=True)
        with torch.no_grad():
            outputs.append(ours(x))
    strided, pooled = outputs
    with torch.no_grad():
        expected = theirs(x)

    torch.testing.assert_close(pooled, expected, rtol=1e-10, atol=1e-10)
    assert (strided - expected).abs().max() > 0.01 * expected.abs().max()
