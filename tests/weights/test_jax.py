"""The published Wide-ResNets, against the network of their code written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.config import parse_config
from dpsgd.errors import ConfigError
from dpsgd.models import build_model
from dpsgd.weights import fit, read_weights

CLASSES = 5
Arrays = dict[str, np.ndarray]


def checkpoint(blocks: int = 2, width: int = 1) -> Arrays:
    """Arrays by the names and shapes that the published code gives them."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}

    def conv(name: str, size: int, inputs: int, outputs: int) -> None:
        arrays[f"{name}/w"] = rng.standard_normal((size, size, inputs, outputs))
        arrays[f"{name}/gain"] = rng.uniform(0.5, 1.5, outputs)
        arrays[f"{name}/bias"] = 0.1 * rng.standard_normal(outputs)

    def norm(name: str, channels: int) -> None:
        arrays[f"{name}/scale"] = rng.uniform(0.5, 1.5, channels)
        arrays[f"{name}/offset"] = 0.1 * rng.standard_normal(channels)

    conv("First_conv", 3, 3, 16)
    inputs = 16
    for stage in (1, 2, 3):
        outputs = 16 * width * 2 ** (stage - 1)
        norm(f"Block_{stage}_skip_norm", inputs)
        conv(f"Block_{stage}_skip_conv", 1, inputs, outputs)
        for block in range(blocks):
            for half in (0, 1):
                norm(f"Block_{stage}_norm_{block}_{half}", inputs)
                conv(f"Block_{stage}Conv_{block}_{half}", 3, inputs, outputs)
                inputs = outputs
    norm("Final_norm", inputs)
    arrays["Softmax/w"] = rng.standard_normal((inputs, CLASSES))
    arrays["Softmax/b"] = rng.standard_normal(CLASSES)
    return {
        f"wide_res_net/{name}": leaf.astype(np.float32) for name, leaf in arrays.items()
    }


class Published:
    """The forward pass of the published code, with channels first."""

    def __init__(self, arrays: Arrays) -> None:
        self.leaves = {
            name.partition("/")[2]: torch.from_numpy(leaf)
            for name, leaf in arrays.items()
        }

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.leaves[f"{name}/w"]
        axes = (0, 1, 2)
        variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
        fan_in = weight[..., 0].numel()
        scale = torch.rsqrt((variance * fan_in).clamp(min=1e-4))
        weight = (weight - mean) * scale * self.leaves[f"{name}/gain"]
        size = weight.shape[0]
        missing = max(0, (x.shape[-1] // stride - 1) * stride + size - x.shape[-1])
        before, after = missing // 2, missing - missing // 2
        x = F.pad(x, (before, after, before, after))
        y = F.conv2d(x, weight.permute(3, 2, 0, 1), stride=stride)
        return y + self.leaves[f"{name}/bias"].view(-1, 1, 1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale, offset = self.leaves[f"{name}/scale"], self.leaves[f"{name}/offset"]
        return F.group_norm(F.relu(x), 16, scale, offset, eps=1e-5)

    def __call__(self, x: Tensor, blocks: int = 2) -> Tensor:
        x = self.conv(x, "First_conv")
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            for block in range(blocks):
                skip = x
                if block == 0:
                    skip = self.norm(x, f"Block_{stage}_skip_norm")
                    skip = self.conv(skip, f"Block_{stage}_skip_conv", stride)
                for half in (0, 1):
                    step = stride if (block, half) == (0, 0) else 1
                    x = self.norm(x, f"Block_{stage}_norm_{block}_{half}")
                    x = self.conv(x, f"Block_{stage}Conv_{block}_{half}", step)
                x = x + skip
        features = self.norm(x, "Final_norm").mean((2, 3))
        return features @ self.leaves["Softmax/w"] + self.leaves["Softmax/b"]


def config(path: Path, **model: object) -> object:
    settings = {"depth": 16, "width": 1, "stride_padding": "same", **model}
    return parse_config(
        {
            "data": {"source": "digits"},
            "model": {**settings, "init_from": str(path)},
            "finetune": {"classifier": "load"},
            "privacy": {"noise_multiplier": 1, "delta": 1e-5, "expected_batch_size": 1},
            "optimizer": {"learning_rate": 1},
            "train": {"num_steps": 1},
        }
    )


@pytest.mark.parametrize("older", [False, True], ids=["names", "older names"])
def test_a_published_network_computes_what_its_code_computes(
    tmp_path: Path, older: bool
) -> None:
    arrays = checkpoint()
    held = dict(arrays)
    if older:  # as the published files have them, says their reader
        held = {
            name.replace("/Block", "/~conv_fn/Block"): leaf
            for name, leaf in arrays.items()
        }
    path = tmp_path / "wrn.npz"
    np.savez(path, **held)
    settings = config(path)
    model = build_model(settings.model, image_shape=(3, 8, 8), num_classes=CLASSES)
    start = fit(read_weights(settings.model), model, settings)
    start.apply(model)
    images = torch.from_numpy(np.random.default_rng(1).random((4, 3, 8, 8), np.float32))

    assert len(start.loaded) == len(arrays)
    assert start.unused == start.reinitialized == ()
    with torch.no_grad():
        # float32 rounding of sums in another order, over 16 layers
        torch.testing.assert_close(
            model(images), Published(arrays)(images), rtol=1e-4, atol=1e-4
        )


def test_padding_of_ours_is_refused_for_weights_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "wrn.npz"
    np.savez(path, **checkpoint())
    settings = config(path, stride_padding="symmetric")
    model = build_model(settings.model, image_shape=(3, 8, 8), num_classes=CLASSES)

    rule = "model.stride_padding=symmetric: the weights are of same"
    with pytest.raises(ConfigError, match=rule):
        fit(read_weights(settings.model), model, settings)


def test_arrays_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, **{"res_net/~/initial_conv/w": np.zeros((7, 7, 3, 64), np.float32)})
    settings = config(path)
    model = build_model(settings.model, image_shape=(3, 8, 8), num_classes=CLASSES)

    with pytest.raises(ConfigError, match=r"is \[.*\] here and no such tensor there"):
        fit(read_weights(settings.model), model, settings)
    settings = config(path, name="convnet", depth=2, groups=4)
    model = build_model(settings.model, image_shape=(3, 8, 8), num_classes=CLASSES)
    with pytest.raises(ConfigError, match="no tensor of it has a counterpart in convn"):
        fit(read_weights(settings.model), model, settings)
