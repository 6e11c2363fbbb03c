import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import remembering, small_config, start

from dpsgd.assembly import load_network, plan_of
from dpsgd.data import DataSplits, ImageDataset, load_datasets
from dpsgd.errors import CheckpointError, ConfigError, DataError
from dpsgd.models import trainable_params
from dpsgd.train import train


def unnamed(monkeypatch: pytest.MonkeyPatch, label: int = 3) -> None:
    """Replaces the data by six images whose source declares no classes."""
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, label])
    dataset = ImageDataset(images=images, labels=labels)
    splits = DataSplits(train=dataset, test=dataset)
    monkeypatch.setattr("dpsgd.assembly.load_datasets", lambda _: splits)


def test_published_facts_are_planned_for_without_reading_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpsgd.assembly.load_datasets", None)
    with remembering():
        plan = plan_of(small_config())

    assert plan.facts.num_examples == 1437


def test_the_plan_before_is_the_plan_of_the_run(tmp_path: Path) -> None:
    _, _, plan = start(tmp_path)
    with remembering():
        before = plan_of(small_config())

    same = {"facts": plan.facts, "accountant": plan.accountant}
    assert dataclasses.replace(before, **same) == plan


def test_the_size_is_declared_whatever_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed(monkeypatch)
    changes = {"data.num_examples": 1000, "model.num_classes": 4}
    run, _, plan = start(tmp_path, changes)

    assert run.sampler.num_rows == 6
    assert plan.mechanism.sample_rate == run.sampler.sample_rate == 0.016
    assert plan.facts.class_names == ("0", "1", "2", "3")


def test_classes_are_never_counted_from_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed(monkeypatch)

    with pytest.raises(ConfigError, match=r"model\.num_classes=null.*never counted"):
        start(tmp_path)
    rule = r"data\.train=row 5: has label 3, which must be in \[0, 3\); .* or raise"
    with pytest.raises(DataError, match=rule):
        start(tmp_path, {"model.num_classes": 3})


def test_one_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unnamed(monkeypatch)

    with pytest.raises(ConfigError, match=r"model\.num_classes=1: must be at least 2"):
        start(tmp_path, {"model.num_classes": 1})


@pytest.mark.parametrize("classes", [9, 11])
def test_other_classes_than_the_data_have_are_refused(
    tmp_path: Path, classes: int
) -> None:
    rule = rf"model\.num_classes={classes}: the data set declares 10 classes; set 10"
    with pytest.raises(ConfigError, match=rule):
        start(tmp_path, {"model.num_classes": classes})
    with pytest.raises(ConfigError, match=rule):
        plan_of(small_config({"model.num_classes": classes}))


def test_a_resumed_run_keeps_the_microbatch_that_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state, plan = start(tmp_path)
    train(run, state, stop_requested=lambda: state.step == 1)
    monkeypatch.setattr("dpsgd.planning._CPU_MICROBATCH_BYTES", 1 << 20)

    assert plan.microbatch_size == 16
    assert start(tmp_path / "new")[2].microbatch_size < 16
    assert start(tmp_path, resume=True)[2].microbatch_size == 16
    changes = {"runtime.microbatch_size": 5}
    assert start(tmp_path, changes, resume=True)[2].microbatch_size == 5


def test_a_resumed_run_has_the_mechanism_and_state_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    changes = {"train.seed": None, "optimizer.momentum": 0.9}
    run, state, _ = start(tmp_path, changes)
    train(run, state, stop_requested=lambda: state.step == 2)
    resumed, restored, _ = start(tmp_path, changes, resume=True)

    assert resumed.mechanism == run.mechanism
    assert resumed.streams == run.streams  # drawn from the operating system once
    assert restored.step == 2
    assert restored.ema is not None
    assert state.ema is not None
    for name, leaf in state.params.items():
        assert torch.equal(leaf, restored.params[name])
        assert torch.equal(state.ema[name], restored.ema[name])
    momenta = restored.optimizer.state()
    assert momenta
    for name, leaf in state.optimizer.state().items():
        assert torch.equal(leaf, momenta[name])


def test_weights_that_are_not_the_networks_are_refused(tmp_path: Path) -> None:
    config = small_config()
    splits = load_datasets(config.data)
    _, state, _ = start(tmp_path)
    model, names = load_network(config, splits, state.params, torch.device("cpu"))
    assert names == tuple("0123456789")
    assert trainable_params(model).keys() == state.params.keys()

    wrong: dict[str, Any] = dict(state.params)
    name, leaf = wrong.popitem()
    with pytest.raises(CheckpointError, match=f"weights.{name}=.*has null"):
        load_network(config, splits, wrong, torch.device("cpu"))
    wrong[name] = torch.zeros(1, *leaf.shape)
    with pytest.raises(CheckpointError, match=rf"weights.{name}=.*has \[1, "):
        load_network(config, splits, wrong, torch.device("cpu"))
