"""Runs that start from given weights and train a part of the network."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    dpsgd_eval,
    dpsgd_train,
    small_config,
    start,
    write_config,
)

from dpsgd.assembly import plan_of
from dpsgd.checkpoint import read_tensors
from dpsgd.errors import CheckpointError, ConfigError
from dpsgd.train import train

CLASSIFIER = {"classifier.weight", "classifier.bias"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of other seed, whose weights others start from."""
    folder = tmp_path_factory.mktemp("source")
    config = write_config(folder, {"train.seed": 1})
    assert dpsgd_train(config, "--run-dir", folder / "run") == 0
    return folder / "run"


def from_source(source: Path, **changes: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {"model.init_from": str(source), "finetune.train": "classifier", **named}


def weights(source: Path, which: str) -> Mapping[str, torch.Tensor]:
    tensors = load_file(source / "model.safetensors")
    return {
        name.removeprefix(f"{which}/"): leaf
        for name, leaf in tensors.items()
        if name.startswith(f"{which}/")
    }


@pytest.mark.parametrize(
    ("which", "expected"), [("auto", "ema"), ("ema", "ema"), ("last", "last")]
)
def test_a_run_starts_from_the_weights_of_another(
    source: Path, tmp_path: Path, which: str, expected: str
) -> None:
    changes = from_source(source, finetune__train="all", model__init_weights=which)
    _, state, plan = start(tmp_path, changes)

    for name, leaf in weights(source, expected).items():
        assert torch.equal(state.params[name], leaf) == (name not in CLASSIFIER)
    assert plan.initialization is not None
    rows = dict(plan.rows(small_config(changes)))
    assert rows["weights from"] == f"{source} (4 steps); public by declaration"
    covered = (
        r"NOT covered by epsilon; own guarantee: \(\d\.\d+, 0\.0001\)-DP per example, "
        "but seeded: NOT to be released as private"
    )
    assert re.fullmatch(covered, rows["their data"])
    assert rows["parameters"] == "78,650"


@pytest.mark.parametrize("kind", ["folder", "file", "unfinished"])
def test_weights_of_a_run_are_found_however_they_are_named(
    source: Path, tmp_path: Path, kind: str
) -> None:
    named = source
    if kind == "file":
        named = source / "model.safetensors"
    if kind == "unfinished":
        named = tmp_path / "run"
        named.mkdir()
        for name in ("config.yaml", "checkpoints"):
            (named / name).symlink_to(source / name)
    _, state, plan = start(tmp_path / "new", from_source(named, finetune__train="all"))

    ema = weights(source, "ema")
    assert torch.equal(state.params["stem.weight"], ema["stem.weight"])
    rows = dict(plan.rows(small_config()))
    assert rows["their data"].endswith("not known yet") == (kind == "unfinished")


def test_a_setting_that_no_shape_shows_is_compared(source: Path) -> None:
    changes = from_source(source, model__groups=8, model__order="norm_activation")

    with pytest.raises(ConfigError) as caught:
        plan_of(small_config(changes))
    first, second = str(caught.value).splitlines()
    assert first.startswith("model.groups=8: the weights are of 16; give weights")
    assert second.startswith("model.order=norm_activation: the weights are of activ")


@pytest.mark.parametrize("train_what", ["classifier", r"stages\.2\..*|classifier\..*"])
def test_what_is_frozen_stays_bit_for_bit_and_has_no_noise(
    source: Path, tmp_path: Path, train_what: str
) -> None:
    changes = from_source(source, finetune__train=train_what)
    run, state, plan = start(tmp_path, changes)
    train(run, state)

    assert run.frozen.keys().isdisjoint(state.params)
    ema = weights(source, "ema")
    assert run.frozen.keys() | state.params.keys() == ema.keys()
    for name, leaf in run.frozen.items():
        assert torch.equal(leaf, ema[name]), name
    for name, leaf in state.params.items():
        assert not torch.equal(leaf, ema[name]), name
    assert state.ema is not None
    assert state.ema.keys() == state.params.keys()
    assert plan.num_frozen == sum(leaf.numel() for leaf in run.frozen.values())
    shown = dict(plan.rows(small_config(changes)))["parameters"]
    assert shown.startswith(f"{plan.num_parameters:,} trained ({train_what}), ")


def test_a_run_of_the_classifier_is_evaluated_like_any_other(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    config = write_config(tmp_path, from_source(source))
    assert dpsgd_train(config, "--run-dir", folder) == 0
    report = json.loads((folder / "report.json").read_text())
    capsys.readouterr()

    for which, suffix in (("last", ""), ("ema", "_ema")):
        assert dpsgd_eval(folder, "--weights", which, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["accuracy"] == report[f"test_accuracy{suffix}"]
    assert dpsgd_eval(folder) == 0
    (folder / "model.safetensors").unlink()  # as in a run that goes on
    assert dpsgd_eval(folder) == 0


def test_a_run_records_what_became_of_every_tensor(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = write_config(tmp_path, from_source(source))
    assert dpsgd_train(config, "--run-dir", folder) == 0
    record = json.loads((folder / "plan.json").read_text())["initialization"]
    _, facts = read_tensors(folder / "model.safetensors")

    assert record["source"] == f"{source} (4 steps)"
    assert set(record["reinitialized"]) == CLASSIFIER
    assert {*record["loaded"], *CLASSIFIER} == weights(source, "ema").keys()
    assert str(source) not in json.dumps(facts)  # what is released names no path


def test_a_fine_tuned_run_goes_on_bit_for_bit_without_its_source(
    source: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "source"
    copied.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (copied / name).write_bytes((source / name).read_bytes())
    changes = from_source(copied)
    whole, expected, _ = start(tmp_path / "whole", changes)
    train(whole, expected)
    run, state, _ = start(tmp_path / "parts", changes)
    train(run, state, stop_requested=lambda: state.step == 2)
    for path in copied.iterdir():
        path.unlink()
    resumed, restored, plan = start(tmp_path / "parts", changes, resume=True)
    train(resumed, restored)

    assert restored.step == 4
    for name, leaf in expected.params.items():
        assert torch.equal(leaf, restored.params[name])
    for name, leaf in whole.frozen.items():
        assert torch.equal(leaf, resumed.frozen[name])
    assert "loaded" in dict(plan.rows(small_config(changes)))


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("finetune.train", "norm_and_classifier"),
        ("model.init_from", "/another/run"),
        ("finetune.classifier", "zero"),
    ],
)
def test_a_run_that_began_otherwise_does_not_go_on(
    source: Path, tmp_path: Path, change: str, value: str
) -> None:
    changes = from_source(source)
    run, state, _ = start(tmp_path, changes)
    train(run, state, stop_requested=lambda: state.step == 1)

    with pytest.raises(CheckpointError, match=f"^{change}={value}: the checkpoint has"):
        start(tmp_path, {**changes, change: value}, resume=True)


def test_a_relative_path_means_the_same_weights(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    run, state, _ = start(tmp_path, from_source(Path("run")))
    train(run, state, stop_requested=lambda: state.step == 1)
    monkeypatch.chdir(tmp_path)

    assert start(tmp_path, from_source(source), resume=True)[1].step == 1
