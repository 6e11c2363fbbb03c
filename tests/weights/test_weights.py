"""Weights are read without running code, and every tensor's fate is told."""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_runs import small_config
from torch import nn

from dpsgd.config import Config, ModelConfig, config_to_dict
from dpsgd.errors import CheckpointError, ConfigError
from dpsgd.models import build_model, freeze, initialize
from dpsgd.rng import RandomStreams
from dpsgd.trees import Params
from dpsgd.weights import Initialization, fit, read_weights
from dpsgd.weights.named import NAME_MAPS
from dpsgd.weights.runs import network_of
from dpsgd.weights.sources import Weights

SHAPE = (1, 8, 8)


def network(config: Config, *, num_classes: int = 10, seed: int = 0) -> nn.Module:
    model = build_model(config.model, image_shape=SHAPE, num_classes=num_classes)
    initialize(model, RandomStreams.from_seed(seed).generator("init"))
    freeze(model, config.finetune.train)
    return model


def settings(path: Path | str, **changes: Any) -> Config:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return small_config({"model.init_from": str(path), **named})


def fitted(config: Config, model: nn.Module) -> Initialization:
    return fit(read_weights(config.model), model, config)


@pytest.fixture
def given() -> Params:
    """The weights of a network of 7 classes."""
    return dict(network(small_config(), num_classes=7, seed=1).state_dict())


@pytest.fixture(params=[".pt", ".pth", ".safetensors", "wrapped"])
def path(request: pytest.FixtureRequest, tmp_path: Path, given: Params) -> Path:
    """A file of these weights, in every form."""
    wrapped = request.param == "wrapped"
    path = tmp_path / f"weights{'.pt' if wrapped else request.param}"
    if path.suffix == ".safetensors":
        save_file(given, path)
    elif wrapped:
        state = {f"module.{name}": leaf for name, leaf in given.items()}
        torch.save({"epoch": 3, "model": {"state_dict": state}}, path)
    else:
        torch.save(given, path)
    return path


def test_all_but_the_classifier_is_loaded(path: Path, given: Params) -> None:
    config = settings(path)
    model = network(config)
    classifier = model.classifier.weight.clone()
    start = fitted(config, model)
    start.apply(model)

    assert start.source == str(path)
    assert start.reinitialized == ("classifier.weight", "classifier.bias")
    assert set(start.unused) == set(start.reinitialized)  # those of the source
    assert {*start.loaded, *start.reinitialized} == model.state_dict().keys()
    for name in start.loaded:
        assert torch.equal(model.state_dict()[name], given[name])
    assert torch.equal(model.classifier.weight, classifier)


@pytest.mark.parametrize("name", [one.name for one in fields(ModelConfig)])
def test_every_setting_is_compared_but_for_those_that_decide_nothing(
    given: Params, name: str
) -> None:
    free = {
        *("skip_gain_init", "stochastic_depth", "compute_dtype"),
        *("num_classes", "init_from", "init_weights"),
    }
    config = small_config()
    weights = Weights(source="x.pt", tensors=given, network={name: "another"})
    if name in free:
        assert fit(weights, network(config), config).loaded
        return
    own = getattr(config.model, name)
    rule = f"^model.{name}={'null' if own is None else own}: the weights are of another"
    with pytest.raises(ConfigError, match=rule):
        fit(weights, network(config), config)


def test_a_run_that_is_older_than_a_setting_had_its_default() -> None:
    model = config_to_dict(small_config())["model"]
    older = {name: model[name] for name in model if name != "stride_padding"}

    assert network_of({"settings": {"model": older}}) == model
    assert network_of({"model": older}) == model
    assert network_of({"settings": {}}) == {}


def test_rows_name_every_tensor(path: Path) -> None:
    config = settings(path, finetune__classifier="zero")
    rows = dict(fitted(config, network(config)).rows())

    assert rows["weights from"] == f"{path}; public by declaration"
    assert rows["their data"] == "NOT covered by epsilon; own guarantee: unknown"
    assert rows["loaded"].startswith("50: stem.{weight,bias,gain} stages.0.0.shortcut")
    assert rows["re-initialised"] == "2: classifier.{weight,bias} (zero)"
    assert rows["unused"].startswith("2: classifier.{")


def test_the_record_survives_json(path: Path) -> None:
    config = settings(path)
    start = fitted(config, network(config))
    record = json.loads(json.dumps(start.to_dict()))

    assert "tensors" not in record
    assert Initialization.from_dict(record) == start  # which leaves the tensors out
    assert len(start.sha256) == 64


def test_the_digest_is_of_names_and_values(path: Path, given: Params) -> None:
    config = settings(path)
    before = fitted(config, network(config)).sha256
    assert fitted(config, network(config, seed=5)).sha256 == before
    other = path.with_name("other.pt")
    given["stem.bias"] += 1e-3
    torch.save(given, other)

    assert fitted(settings(other), network(config)).sha256 != before


def test_a_classifier_may_be_zero_or_loaded(path: Path, given: Params) -> None:
    config = settings(path, finetune__classifier="zero")
    model = network(config)
    fitted(config, model).apply(model)
    assert not model.classifier.weight.any()
    assert not model.classifier.bias.any()

    config = settings(path, finetune__classifier="load")
    model = network(config, num_classes=7)
    start = fitted(config, model)
    start.apply(model)
    assert torch.equal(model.classifier.weight, given["classifier.weight"])
    assert start.reinitialized == start.unused == ()


def test_a_classifier_of_other_classes_is_not_loaded(path: Path) -> None:
    config = settings(path, finetune__classifier="load")
    rule = (
        r"classifier.bias is \[10\] here and \[7\] there; "
        "set finetune.classifier=initialize for other classes"
    )
    with pytest.raises(ConfigError, match=rule):
        fitted(config, network(config))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model__width": 2}, r"stages\..* is \[\d.* here and \[\d.* there"),
        ({"model__depth": 16}, r"stages.0.1.last.bias is .* here and no such tensor"),
        ({"model__weight_standardization": False}, "gain has no place in the network"),
        ({"model__name": "convnet", "model__depth": 2}, "no such tensor there"),
    ],
)
def test_weights_of_another_network_are_refused(
    path: Path, changes: dict[str, Any], rule: str
) -> None:
    config = settings(path, **changes)

    with pytest.raises(ConfigError, match=rule) as caught:
        fitted(config, network(config))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 6
    for line in lines:
        assert line.startswith(f"model.init_from={path}: ")


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    deeper = network(small_config({"model.depth": 16}))
    path = tmp_path / "deeper.pt"
    torch.save(deeper.state_dict(), path)
    config = settings(path)

    with pytest.raises(ConfigError, match=r"stages\.0\.1\..* has no place in the netw"):
        fitted(config, network(config))


def test_tensors_that_are_of_no_part_of_the_network_are_unused(
    tmp_path: Path, given: Params
) -> None:
    path = tmp_path / "more.pt"
    torch.save({**given, "auxiliary.weight": torch.zeros(3)}, path)
    config = settings(path)

    assert "auxiliary.weight" in fitted(config, network(config)).unused


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, given: Params, value: float
) -> None:
    path = tmp_path / "broken.pt"
    given["stem.weight"][0, 0, 0, 0] = value
    torch.save(given, path)
    config = settings(path)

    with pytest.raises(ConfigError, match=r"stem\.weight holds inf or NaN; give sound"):
        fitted(config, network(config))


def test_a_classifier_that_is_drawn_is_not_frozen(path: Path) -> None:
    config = settings(path, finetune__train=r"stages\.2\..*")
    rule = r"leaves classifier.weight frozen, which is drawn anew; let it match"
    with pytest.raises(ConfigError, match=rule):
        fitted(config, network(config))
    config = settings(
        path, finetune__train=r"stages\.2\..*", finetune__classifier="load"
    )
    assert fitted(config, network(config, num_classes=7)).reinitialized == ()


class Hostile:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return sys.exit, ("code ran",)


def hostile(folder: Path) -> Path:
    torch.save({"stem.weight": Hostile()}, folder / "hostile.pt")
    return folder / "hostile.pt"


def hostile_arrays(folder: Path) -> Path:
    np.savez(folder / "hostile.npz", w=np.array([Hostile()], dtype=object))
    return folder / "hostile.npz"


def pickled_arrays(folder: Path) -> Path:
    path = folder / "pickled.npz"
    path.write_bytes(pickle.dumps({"w": np.zeros(3)}))
    return path


def truncated(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        whole, path = folder / f"whole{suffix}", folder / f"cut{suffix}"
        leaves = {"stem.weight": torch.zeros(1000)}
        if suffix == ".safetensors":
            save_file(leaves, whole)
        elif suffix == ".npz":
            np.savez(whole, w=np.zeros(1000))
        else:
            torch.save(leaves, whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        return path

    write.__name__ = f"truncated{suffix}"
    return write


def not_a_state_dict(folder: Path) -> Path:
    torch.save(torch.zeros(3), folder / "tensor.pt")
    return folder / "tensor.pt"


def absent(suffix: str) -> Callable[[Path], Path]:
    def name(folder: Path) -> Path:
        return folder / f"absent{suffix}"

    name.__name__ = f"absent{suffix}"
    return name


def empty(folder: Path) -> Path:
    (folder / "empty.pt").touch()
    return folder / "empty.pt"


@pytest.mark.parametrize(
    ("write", "rule"),
    [
        (hostile, "cannot be read as tensors alone"),
        (hostile_arrays, "cannot be read as tensors alone .*allow_pickle=False"),
        (pickled_arrays, "cannot be read as tensors alone"),
        (truncated(".pt"), "cannot be read as tensors alone"),
        (truncated(".safetensors"), "cannot be read as tensors alone"),
        (truncated(".npz"), "is damaged"),
        (not_a_state_dict, "it holds no state dict"),
        (empty, "cannot be read as tensors alone .EOFError"),
        (absent(".pt"), "no such file"),
        (absent(".npz"), "no such file"),
        (absent(".safetensors"), "no such file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_file_that_is_not_tensors_alone_is_refused(
    tmp_path: Path, write: Callable[[Path], Path], rule: str
) -> None:
    path = write(tmp_path)

    with pytest.raises(CheckpointError, match=rule) as caught:
        read_weights(settings(path).model)
    assert str(caught.value).startswith(f"model.init_from={path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights.bin", "weights", "torchhub:resnet50"])
def test_a_source_of_no_known_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"neither a run directory nor a file"):
        read_weights(settings(tmp_path / name).model)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        read_weights(settings(tmp_path).model)


@pytest.mark.parametrize("name", ["torchvision:resnet50", "timm:nf_resnet50"])
def test_a_named_network_without_a_counterpart_is_refused_unseen(name: str) -> None:
    rule = f"model.init_from={name}: no tensor of it has a counterpart in wide_resnet"
    with pytest.raises(ConfigError, match=f"{rule}; known for it: jax"):
        read_weights(settings(name).model)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch, given: Params) -> Params:
    """Lets two named networks be mapped onto ours, by a prefix of their names."""

    def without_prefix(tensors: Params) -> Params:
        return {name.removeprefix("theirs."): leaf for name, leaf in tensors.items()}

    for name in ("torchvision:resnet50.IMAGENET1K_V2", "timm:resnet50", "timm:none"):
        monkeypatch.setitem(NAME_MAPS, (name, "wide_resnet"), without_prefix)
    return {f"theirs.{name}": leaf for name, leaf in given.items()}


def test_weights_of_torchvision_are_mapped(
    monkeypatch: pytest.MonkeyPatch, mapped: Params
) -> None:
    import torchvision.models

    asked = []

    def get_state_dict(self: Any, **options: Any) -> Params:
        asked.append((self.name, options))
        return mapped

    weights = torchvision.models.ResNet50_Weights
    monkeypatch.setattr(weights, "get_state_dict", get_state_dict)
    config = settings("torchvision:resnet50.IMAGENET1K_V2")

    assert len(fitted(config, network(config)).loaded) == 50
    assert asked == [("IMAGENET1K_V2", {"weights_only": True, "check_hash": True})]


def test_weights_of_timm_are_mapped(
    monkeypatch: pytest.MonkeyPatch, mapped: Params
) -> None:
    def create_model(name: str, *, pretrained: bool) -> Any:
        if name == "none":
            raise RuntimeError("Unknown model (none)")
        assert (name, pretrained) == ("resnet50", True)
        return SimpleNamespace(state_dict=lambda: mapped)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    config = settings("timm:resnet50")

    assert len(fitted(config, network(config)).loaded) == 50
    with pytest.raises(CheckpointError, match=r"timm:none: cannot be had \(Unknown mo"):
        read_weights(settings("timm:none").model)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"needs the package timm; pip install timm"):
        read_weights(config.model)


def test_settings_of_fine_tuning_need_weights() -> None:
    for name, value in (("train", "classifier"), ("classifier", "zero")):
        rule = f"finetune.{name}={value}: means nothing while model.init_from is null"
        with pytest.raises(ConfigError, match=rule):
            small_config({f"finetune.{name}": value})
