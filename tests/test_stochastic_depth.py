"""Stochastic depth in a run: drawn per view, by step, and off in evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config, start
from torch import nn

from dpsgd.clipping import clipped_grad
from dpsgd.config import ModelConfig
from dpsgd.errors import ConfigError
from dpsgd.models import (
    MODELS,
    Architecture,
    initialize,
    per_example_loss,
    per_user_loss,
    trainable_params,
)
from dpsgd.models.nf_resnet import nf_resnet_design
from dpsgd.models.norm_free import NormFreeNetwork
from dpsgd.rng import RandomStreams
from dpsgd.run import Run, TrainState
from dpsgd.train import train_step
from dpsgd.trees import Params, zeros_like

CHANGES = {
    "model.name": "nf_resnet",
    "model.skip_gain_init": 1.0,
    "model.stochastic_depth": 0.9,
    "data.augmentation": "flip",
    "data.augmentation_multiplicity": 2,
}


def tiny_nf_resnet(
    config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int
) -> NormFreeNetwork:
    """Two blocks, of which the second is left out for every second view or so."""
    design = replace(nf_resnet_design(50), depths=(2,), widths=(8,), stem=((4, 3, 1),))
    return NormFreeNetwork(
        design,
        in_channels=image_shape[0],
        num_classes=num_classes,
        skip_gain_init=config.skip_gain_init,
        stochastic_depth=config.stochastic_depth,
    )


@pytest.fixture(autouse=True)
def _nf_resnets_are_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("depth", "width")  # which small runs set
    uses = ("skip_gain_init", "stochastic_depth", *small)
    tiny = Architecture(build=tiny_nf_resnet, uses=uses)
    monkeypatch.setitem(MODELS, "nf_resnet", tiny)


def started(
    folder: Path, changes: dict[str, Any] | None = None, **options: bool
) -> Any:
    return start(folder, {**CHANGES, **(changes or {})}, **options)


def trained(run: Run, state: TrainState, num_steps: int = 2) -> Params:
    for _ in range(num_steps):
        train_step(run, state)
    return state.params


def network(run: Run) -> nn.Module:
    return tiny_nf_resnet(run.config.model, image_shape=(1, 8, 8), num_classes=10)


def test_a_step_takes_the_draws_of_its_stream(tmp_path: Path) -> None:
    run, state, _ = started(tmp_path)
    draw = run.sampler.draw(0)
    ((views, labels, uniforms, mask),) = run.load_views(draw, 0)
    found = zeros_like(state.params)
    run.grad_fn.accumulate(found, state.params, views, labels, uniforms, mask=mask)
    loss_fn, count = per_example_loss(network(run)), len(draw)
    rng = run.streams.generator("stochastic_depth", 0)
    expected = torch.from_numpy(rng.random((count, 2, 2), dtype="float32"))
    grad_fn = clipped_grad(loss_fn, clipping_norm=1.0)
    by_hand = grad_fn(state.params, views[:count], labels[:count], expected)
    without = grad_fn(state.params, views[:count], labels[:count])

    for name, leaf in by_hand.clipped_sum.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=1e-6)
    apart = (by_hand.per_sample_norms - without.per_sample_norms).abs()
    assert int((apart > 1e-3).sum()) > 0


@pytest.mark.parametrize("engine", ["vmap", "ghost"])
def test_the_microbatch_changes_nothing(tmp_path: Path, engine: str) -> None:
    params = []
    for size in (3, 64):
        changes = {"runtime.microbatch_size": size, "runtime.engine": engine}
        run, state, _ = started(tmp_path / str(size), changes)
        params.append(trained(run, state))

    for name, leaf in params[0].items():
        # Sums of some twenty examples in another order, at learning rate 0.5.
        torch.testing.assert_close(params[1][name], leaf, rtol=0, atol=1e-5)


def test_a_resumed_run_repeats_the_draws(tmp_path: Path) -> None:
    straight = trained(*started(tmp_path / "one")[:2], num_steps=4)
    run, state, _ = started(tmp_path / "two")
    trained(run, state)
    run.save(state)
    again, state, _ = started(tmp_path / "two", resume=True)
    resumed = trained(again, state)

    assert state.step == 4
    assert all(torch.equal(leaf, resumed[name]) for name, leaf in straight.items())


def test_evaluation_leaves_no_branch_out(tmp_path: Path) -> None:
    run, state, _ = started(tmp_path / "with")
    other, _, _ = started(tmp_path / "without", {"model.stochastic_depth": 0.0})

    assert run.evaluate(state.params) == other.evaluate(state.params)
    draw = run.sampler.draw(0)
    assert [len(part) for part in run.load_views(draw, 0)] == [4]
    assert [len(part) for part in other.load_views(draw, 0)] == [3]


def test_the_loss_of_a_user_is_the_mean_over_its_examples() -> None:
    model = tiny_nf_resnet(
        ModelConfig(name="nf_resnet", skip_gain_init=1.0, stochastic_depth=0.9),
        image_shape=(1, 8, 8),
        num_classes=10,
    )
    initialize(model, RandomStreams.from_seed(0).generator("init"))
    params, views = trainable_params(model), torch.randn(3, 2, 1, 8, 8)
    labels, uniforms = torch.tensor([1, 2, 3]), torch.rand(3, 2, 2)
    present = torch.tensor([True, True, False])
    each = [
        per_example_loss(model)(params, *example)
        for example in zip(views, labels, uniforms, strict=True)
    ]
    found = per_user_loss(model)(params, views, labels, present, uniforms)

    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


def test_features_are_not_cached_with_it() -> None:
    changes = {
        **CHANGES,
        "model.init_from": "weights.pt",
        "finetune.train": "classifier",
        "data.fixed_views": True,
        "runtime.feature_cache": "features",
    }
    rule = r"runtime\.feature_cache=.*: .*once, without stochastic depth; set model"
    with pytest.raises(ConfigError, match=rule):
        small_config(changes)
