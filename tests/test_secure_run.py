"""Runs with secure noise: what they do, say, and never repeat."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_runs import dpsgd_train, remembering, small_config, start, write_config

from dpsgd.assembly import assemble
from dpsgd.checkpoint import CheckpointStore
from dpsgd.clipping import clipping_slack
from dpsgd.data import load_datasets
from dpsgd.errors import CheckpointError
from dpsgd.feeding import feed_of
from dpsgd.optim import SecureNoise
from dpsgd.train import train, train_step
from dpsgd.trees import Params, num_elements

SMALL = {
    "model.name": "convnet",
    "model.depth": 2,
    "model.groups": 4,
    "eval.every": 100,
}
SECURE = {**SMALL, "privacy.noise": "secure", "train.seed": None}


def flat(params: Params) -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in params.values()])


def test_a_run_has_the_noise_of_its_sums(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, SECURE)
    expected = SecureNoise.for_sums(
        run.mechanism,
        num_parameters=num_elements(state.params),
        clipping_slack=clipping_slack(state.params, 1.0),
    )

    assert run.secure_noise == expected
    assert start(tmp_path / "other", SMALL)[0].secure_noise is None
    with pytest.raises(ValueError, match=r"noise=standard: the mechanism has secure"):
        dataclasses.replace(run, secure_noise=None)


def test_without_noise_a_step_is_the_standard_one_but_for_rounding(
    tmp_path: Path,
) -> None:
    rule = {"optimizer.momentum": 0.9, "optimizer.weight_decay": 0.1}
    changes = {**SMALL, **rule, "privacy.noise_multiplier": 0.0}
    run, state, _ = start(tmp_path / "a", changes)
    summed_widely = {**changes, "runtime.engine": "vmap"}  # as secure noise asks
    other, secure_state, _ = start(tmp_path / "b", summed_widely)
    none = SecureNoise.for_sums(
        run.mechanism, num_parameters=10_074, clipping_slack=1e-4
    )
    privacy = dataclasses.replace(other.config.privacy, noise="secure")
    config = dataclasses.replace(other.config, privacy=privacy)
    before = flat(state.params).clone()
    train_step(run, state)
    secure = dataclasses.replace(other, config=config, secure_noise=none)
    train_step(secure, secure_state)

    assert none.std == 0
    assert state.ema is not None
    assert secure_state.ema is not None
    for one, two in (
        (state.params, secure_state.params),
        (state.ema, secure_state.ema),
    ):
        torch.testing.assert_close(flat(one), flat(two), rtol=0, atol=1e-6)
    assert float((flat(state.params) - before).norm()) > 0.1


def test_the_noise_is_that_of_the_mechanism(tmp_path: Path) -> None:
    changes = {**SECURE, "privacy.expected_batch_size": 0.001}
    run, state, _ = start(tmp_path, changes)
    before = flat(state.params).clone()
    assert len(run.sampler.draw(0)) == 0
    train_step(run, state)
    moved = (flat(state.params) - before) * 0.001 / 0.5  # times B over the rate

    # 10,074 draws have their standard deviation within 3 % (4 sigma).
    assert float(moved.std()) == pytest.approx(1.0, rel=0.03)


def test_a_resumed_run_repeats_its_draws_and_none_of_its_noise(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, SECURE)
    train(run, state, stop_requested=lambda: state.step == 2)
    runs = [start(tmp_path, SECURE, resume=True) for _ in range(2)]
    for resumed, restored, _ in runs:
        assert (resumed.sampler.draw(2) == run.sampler.draw(2)).all()
        assert restored.step == 2
        torch.testing.assert_close(
            flat(restored.params), flat(state.params), rtol=0, atol=0
        )
        train_step(resumed, restored)

    (_, first, _), (_, second, _) = runs
    # Equal noise would leave them equal, on a CPU bit for bit.
    apart = (flat(first.params) - flat(second.params)) * 16 / 0.5
    assert float(apart.std()) == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize(("changes", "size"), [(SMALL, 4), (SECURE, None)])
def test_no_draw_of_a_secure_run_ends_with_a_smaller_pass(
    tmp_path: Path, changes: dict[str, Any], size: int | None
) -> None:
    """On CUDA a standard run ends its draws with half a microbatch."""
    run, _, plan = start(tmp_path, {**changes, "runtime.microbatch_size": 8})
    gpu = torch.device("cuda")
    there = dataclasses.replace(plan, device=gpu, execution="cuda_graph")
    feed = feed_of(run.config, load_datasets(run.config.data).train)

    assert feed._smaller_microbatch(there) == size
    compiled = dataclasses.replace(there, execution="compile")
    assert feed._smaller_microbatch(compiled) is None
    assert [len(mask) for _, _, mask in run.load_views(np.arange(18), 0)] == [8] * 3


@pytest.mark.parametrize("changes", [SECURE, SMALL], ids=["secure", "standard"])
def test_steps_that_were_shown_are_not_taken_again(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    run, state, _ = start(tmp_path, changes)
    train(run, state, stop_requested=lambda: state.step == 2)
    store = CheckpointStore(tmp_path, keep=2)
    config, checkpoint = small_config(changes), store.newest()
    with remembering():
        with pytest.raises(CheckpointError, match="step 3 was shown, the newest"):
            assemble(config, store=store, checkpoint=checkpoint, shown_step=3)
        assemble(config, store=store, checkpoint=checkpoint, shown_step=2)


def test_plan_report_and_weights_say_which_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert dpsgd_train(write_config(tmp_path, SECURE), "--run-dir", run) == 0

    shown = " ".join(capsys.readouterr().out.split())
    assert "noise │ secure" in shown
    assert "random streams │ from the operating system" in shown
    report = json.loads((run / "report.json").read_text())
    assert report["noise"] == "secure"
    with safe_open(run / "model.safetensors", framework="pt") as weights:
        assert json.loads(weights.metadata()["dpsgd"])["noise"] == "secure"
