"""Training without privacy: right, and never mistaken for the other."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    audit_of,
    dpsgd_train,
    read_lines,
    small_config,
    start,
    write_config,
)
from torch import nn
from torch.func import functional_call

from dpsgd.checkpoint import read_tensors
from dpsgd.clipping import Execution
from dpsgd.config import config_to_dict, parse_config
from dpsgd.data import PoissonSampler
from dpsgd.errors import ConfigError
from dpsgd.kernels.dispatch import operator_modules
from dpsgd.models import per_example_loss, trainable_params
from dpsgd.non_private import NonPrivateStep, ShuffledSampler, SummedGrad
from dpsgd.report.runs import read_run
from dpsgd.report.statement import joint_epsilon, statement_of
from dpsgd.rng import RandomStreams
from dpsgd.train import train
from dpsgd.trees import zeros_like

Network = Callable[..., nn.Module]
WITHOUT = {
    "privacy.enabled": False,
    "privacy.noise_multiplier": None,
    "privacy.delta": None,
}
HOW: tuple[Execution, Execution] = ("eager", "cuda_graph")
STREAMS = RandomStreams.from_seed(3)


def without_privacy(**changes: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {**WITHOUT, **named}


def test_an_epoch_holds_every_example_once_in_a_new_order() -> None:
    sampler = ShuffledSampler(num_rows=23, batch_size=5, streams=STREAMS)
    epochs = [
        np.concatenate([sampler.draw(4 * epoch + step) for step in range(4)])
        for epoch in range(3)
    ]

    for rows in epochs:
        assert len(set(rows.tolist())) == 20  # three are left, less than a batch
        assert set(rows.tolist()) <= set(range(23))
    assert not np.array_equal(epochs[0], epochs[1])
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())
    again = ShuffledSampler(num_rows=23, batch_size=5, streams=STREAMS)
    assert np.array_equal(again.draw(7), sampler.draw(7))


@pytest.mark.parametrize("size", [0, 24])
def test_a_batch_that_no_epoch_holds_is_refused(size: int) -> None:
    rule = rf"privacy.expected_batch_size={size}: must be in \[1, 23\]"
    with pytest.raises(ConfigError, match=rule):
        ShuffledSampler(num_rows=23, batch_size=size, streams=STREAMS)


def test_gradient_is_that_of_the_smoothed_loss_of_the_batch(
    tiny_network: Network,
) -> None:
    model = tiny_network(compute_dtype="float64").double()
    params = trainable_params(model)
    views = torch.rand(5, 2, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    mask = torch.tensor([True, True, False, True, False])
    total = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    engine = SummedGrad(per_example_loss(model, label_smoothing=0.2))
    statistics = engine.accumulate(total, params, views, labels, mask=mask)

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    logits = functional_call(model, leaves, (views[mask].flatten(0, 1),))
    losses = F.cross_entropy(
        logits,
        labels[mask].repeat_interleave(2),
        label_smoothing=0.2,
        reduction="none",
    )
    losses = losses.view(3, 2).mean(1)
    expected = torch.autograd.grad(losses.sum(), list(leaves.values()))
    for mine, theirs in zip(total.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(statistics.losses[mask], losses.detach().float())
    assert statistics.losses[~mask].tolist() == [0, 0]
    assert statistics.num_examples == 3
    assert len(statistics.per_sample_norms) == 0


def test_gradient_is_the_same_from_kernels(
    tiny_network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels made for per-sample gradients serve a whole batch as one example."""
    model = tiny_network()
    params, engine = trainable_params(model), SummedGrad(per_example_loss(model))
    batch = torch.randn(2, 1, 3, 8, 8), torch.tensor([0, 2])
    mask = torch.ones(2, dtype=torch.bool)
    plain, fused = zeros_like(params), zeros_like(params)
    engine.accumulate(plain, params, *batch, mask=mask)
    for module in operator_modules().values():
        monkeypatch.setattr(module, "runs_on_triton", lambda _: True)
    engine.accumulate(fused, params, *batch, mask=mask)

    for name, leaf in plain.items():
        # float32 rounding of sums in another order
        torch.testing.assert_close(fused[name], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gradient_is_the_same_from_a_recorded_pass(tiny_network: Network) -> None:
    model = tiny_network().cuda()
    params, loss_fn = trainable_params(model), per_example_loss(model)
    views = torch.randn(6, 1, 3, 8, 8, device="cuda")
    labels = torch.tensor([0, 2, 1, 0, 2, 1], device="cuda")
    mask = torch.tensor([True] * 5 + [False], device="cuda")
    eager, recorded = (SummedGrad(loss_fn, execution=how) for how in HOW)
    expected, found = zeros_like(params), zeros_like(params)
    for _ in range(3):  # recorded once, replayed twice, with other parameters
        for leaf in params.values():
            leaf.detach().mul_(1.1)
        eager.accumulate(expected, params, views, labels, mask=mask)
        seen = recorded.accumulate(found, params, views, labels, mask=mask)

    assert int(seen.num_examples) == 5
    for name, leaf in expected.items():
        # TensorFloat-32 of convolutions whose algorithms may differ
        torch.testing.assert_close(found[name], leaf, rtol=1e-2, atol=1e-2)


def test_a_step_descends_along_the_mean_gradient(tmp_path: Path) -> None:
    changes = without_privacy(
        optimizer__momentum=0.9,
        optimizer__weight_decay=0.01,
        train__label_smoothing=0.1,
        runtime__microbatch_size=5,
    )
    run, state, _ = start(tmp_path, changes)
    expected = {name: leaf.clone() for name, leaf in state.params.items()}
    momenta = zeros_like(expected)
    take_step = run.unaccounted_step
    assert isinstance(take_step, NonPrivateStep)
    for step in range(2):
        total = zeros_like(expected)
        batch = take_step.sampler.draw(step)
        assert len(batch) == 16
        for views, labels, mask in run.load_views(batch, step):
            take_step.grad_fn.accumulate(total, expected, views, labels, mask=mask)
        for name, leaf in expected.items():
            momenta[name] = 0.9 * momenta[name] + total[name] / 16 + 0.01 * leaf
            expected[name] = leaf - 0.5 * momenta[name]
        take_step(run, state)

    assert state.step == 2
    for name, leaf in expected.items():
        # float32 rounding of a decay that torch adds in another order
        torch.testing.assert_close(state.params[name], leaf, rtol=1e-5, atol=1e-6)


def test_plan_progress_report_and_weights_deny_any_guarantee(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, without_privacy(report__unprotected_metrics=True))
    assert dpsgd_train(config, "--run-dir", run) == 0
    shown = capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    _, facts = read_tensors(run / "model.safetensors")

    assert "Plan: NO privacy guarantee" in shown
    assert "NONE: nothing is clipped" in shown
    assert "step 2/4  NO privacy guarantee  test: last" in shown
    assert "Result, NO privacy guarantee" in shown
    planned = json.loads((run / "plan.json").read_text())
    assert planned["private"] is False
    for name in ("epsilon", "delta", "sample_rate", "noise_multiplier", "adjacency"):
        assert planned[name] is None
    stated = statement_of(read_run(run))
    assert (stated.standing, stated.headline) == ("none", "NO privacy guarantee")
    facts_told = dict(stated.facts)
    assert facts_told["Sampling"] == "batches of 16, every epoch in a new order"
    assert facts_told["Mechanism"].startswith("none: ")
    assert joint_epsilon([read_run(run)]) == (math.inf, 0.0)
    for told in ("Privacy plan", "Poisson", "-DP", "eps <=", "clipping norm"):
        assert told not in shown
    assert report["private"] is False
    assert facts["private"] is False
    for name in ("epsilon", "delta", "noise_multiplier", "sample_rate"):
        assert report[name] is None
    assert facts["epsilon"] is facts["delta"] is facts["accountant"] is None
    lines = read_lines(run / "metrics.jsonl")
    assert all(line["epsilon"] is None for line in lines if "epsilon" in line)
    unprotected = [line["unprotected"] for line in lines if "unprotected" in line]
    told = {"realized_batch_size", "train_loss", "num_nonfinite"}
    assert [set(values) for values in unprotected] == 4 * [told]


def test_a_private_run_is_reported_as_one(tmp_path: Path) -> None:
    assert dpsgd_train(write_config(tmp_path), "--run-dir", tmp_path / "run") == 0

    assert json.loads((tmp_path / "run" / "report.json").read_text())["private"] is True


def test_epsilon_is_infinite_for_whoever_asks(tmp_path: Path) -> None:
    run, state, plan = start(tmp_path, WITHOUT)

    assert run.mechanism.noise_multiplier == 0
    assert plan.epsilon.upper == math.inf
    assert run.ledger.epsilon_spent(4) == run.ledger.epsilon_exactly(1) == math.inf
    train(run, state)
    assert state.step == 4


def test_a_private_run_refuses_the_other_step(tmp_path: Path) -> None:
    private, state, _ = start(tmp_path / "private")
    other, _, _ = start(tmp_path / "other", WITHOUT)
    before = {name: leaf.clone() for name, leaf in state.params.items()}

    assert isinstance(private.sampler, PoissonSampler)
    assert private.unaccounted_step is None
    assert isinstance(other.unaccounted_step, NonPrivateStep)
    with pytest.raises(ValueError, match=r"^privacy=False: the mechanism has True"):
        dataclasses.replace(private, unaccounted_step=other.unaccounted_step)
    with pytest.raises(ValueError, match=r"privacy.enabled=True: this step clips noth"):
        other.unaccounted_step(private, state)
    assert all(torch.equal(leaf, before[name]) for name, leaf in state.params.items())


def test_a_run_without_privacy_refuses_the_private_step(tmp_path: Path) -> None:
    run, _, _ = start(tmp_path, WITHOUT)

    with pytest.raises(ValueError, match=r"^privacy=True: the mechanism has False"):
        dataclasses.replace(run, unaccounted_step=None)


def test_there_is_nothing_to_audit(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, WITHOUT)

    with pytest.raises(ConfigError, match="a run without privacy claims"):
        audit_of(run, state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_epsilon", 8),
        ("noise_multiplier", 0),
        ("max_epsilon", 1),
        ("delta", 1e-5),
        ("clipping_norm", 0.5),
        ("rescale_to_unit_norm", False),
        ("accountant", "rdp"),
        ("unit", "user"),
        ("noise", "secure"),
    ],
)
def test_settings_of_a_guarantee_are_refused_without_one(name: str, value: Any) -> None:
    changes = without_privacy(**{f"privacy__{name}": value})

    rule = rf"^privacy\.{name}=.*: means nothing with privacy\.enabled=false"
    with pytest.raises(ConfigError, match=rule):
        small_config(changes)


def test_a_batch_without_privacy_is_a_whole_number() -> None:
    with pytest.raises(ConfigError, match="give a whole number"):
        small_config(without_privacy(privacy__expected_batch_size=2.5))


def test_other_executions_than_eager_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="execution=compile: a run without privacy"):
        start(tmp_path, without_privacy(runtime__execution="compile"))


def test_settings_without_privacy_survive_being_written() -> None:
    config = small_config(WITHOUT)

    assert parse_config(config_to_dict(config)) == config
    assert not config.privacy.enabled


def test_privacy_stays_on_unless_false_is_said() -> None:
    assert small_config().privacy.enabled
    for word in ("no", "off", 0, "False", None):
        with pytest.raises(ConfigError, match=r"privacy\.enabled=.*: must be true or"):
            small_config({"privacy.enabled": word})


def test_a_run_without_privacy_goes_on_bit_for_bit(tmp_path: Path) -> None:
    changes = without_privacy(optimizer__momentum=0.9)
    whole, expected, _ = start(tmp_path / "whole", changes)
    train(whole, expected)
    run, state, _ = start(tmp_path / "parts", changes)
    train(run, state, stop_requested=lambda: state.step == 2)
    resumed, restored, _ = start(tmp_path / "parts", changes, resume=True)
    train(resumed, restored)

    for name, leaf in expected.params.items():
        assert torch.equal(leaf, restored.params[name])


def test_training_without_privacy_learns(tmp_path: Path) -> None:
    changes = without_privacy(
        model__name="convnet",
        model__depth=2,
        model__groups=4,
        privacy__expected_batch_size=128,
        optimizer__learning_rate=0.1,
        optimizer__momentum=0.9,
        optimizer__schedule="cosine",
        train__num_steps=60,
        eval__every=60,
    )
    config = write_config(tmp_path, changes)
    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test_accuracy"] > 0.95  # 0.969 with this seed
