"""When the loop ends: at its last step or budget, on request, and when it diverges."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from observed_runs import Watcher, assert_same
from small_runs import start

import dpsgd.train
from dpsgd.clipping import clipped_grad
from dpsgd.data import PoissonSampler
from dpsgd.errors import BudgetExceededError, UserError
from dpsgd.privacy import PrivacyLedger, PRVAccountant
from dpsgd.run import EvaluationRecord, Run, TrainState
from dpsgd.train import train
from dpsgd.trees import Params


def test_training_stops_before_the_step_that_passes_the_budget(tmp_path: Path) -> None:
    run, _, plan = start(tmp_path / "unlimited")
    three, four = (run.ledger.epsilon_exactly(count) for count in (3, 4))
    limit = (three + four) / 2
    run, state, plan = start(tmp_path / "limited", {"privacy.max_epsilon": limit})
    records: list[EvaluationRecord] = []

    assert plan.epsilon.upper == four
    assert train(run, state, [Watcher(records)]) == "budget_spent"
    assert state.step == 3
    assert records[-1].step == 3  # the last step is evaluated, whatever eval.every
    assert records[-1].epsilon == pytest.approx(three, rel=1e-3)
    assert records[-1].epsilon <= limit


def test_a_budget_for_no_step_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceededError, match=r"max_epsilon=1e-05 after 0 steps"):
        start(tmp_path, {"privacy.max_epsilon": 1e-5})


def test_a_run_refuses_parts_that_disagree_with_its_mechanism(tmp_path: Path) -> None:
    run, _, _ = start(tmp_path, {"privacy.clipping_norm": 0.5})
    sampler = PoissonSampler(num_rows=1437, sample_rate=0.5, streams=run.streams)
    grad_fn = clipped_grad(
        run.grad_fn.loss_fn, clipping_norm=2.0, rescale_to_unit_norm=False
    )
    mechanism = dataclasses.replace(run.mechanism, noise_multiplier=9.0)
    ledger = PrivacyLedger(mechanism, PRVAccountant())

    with pytest.raises(ValueError, match=r"sample_rate=0\.5: the mechanism has 0\.011"):
        dataclasses.replace(run, sampler=sampler)
    with pytest.raises(ValueError, match=r"l2_sensitivity=2\.0: the mechanism has 1"):
        dataclasses.replace(run, grad_fn=grad_fn)
    with pytest.raises(ValueError, match="mechanism="):
        dataclasses.replace(run, ledger=ledger)


def test_divergence_names_the_learning_rate(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, {"optimizer.learning_rate": 1e30})

    with pytest.raises(
        UserError,
        match=r"optimizer\.learning_rate=1e\+30: training diverged.*lower the learning",
    ):
        train(run, state)


def with_biases(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Makes every step leave the same value in all biases of the classifier."""
    take_step = dpsgd.train.train_step

    def filling(run: Run, state: TrainState) -> Any:
        passes = take_step(run, state)
        state.params["classifier.bias"].fill_(value)
        return passes

    monkeypatch.setattr(dpsgd.train, "train_step", filling)


def test_a_step_that_is_told_to_have_diverged_is_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"runtime.checkpoint_every": 100}
    run, state, _ = start(tmp_path, settings)
    with_biases(monkeypatch, float("nan"))
    with pytest.raises(UserError, match=r"the parameters held .* after step 1;"):
        train(run, state)

    monkeypatch.undo()
    run, state, _ = start(tmp_path, settings, resume=True)
    assert state.step == 1
    with pytest.raises(UserError, match=r"the parameters held .* after step 1;"):
        train(run, state)
    assert state.step == 1


def test_large_parameters_are_no_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state, _ = start(tmp_path, {"train.num_steps": 1})
    measured = run.evaluate(state.params)
    run = dataclasses.replace(run, evaluate=lambda _: measured)
    with_biases(monkeypatch, 2e19)  # its square is inf in float32

    assert train(run, state) == "finished"


def test_a_test_loss_that_is_not_finite_is_divergence_too(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)
    measured = run.evaluate(state.params)
    broken = dataclasses.replace(measured, loss=float("nan"))
    run = dataclasses.replace(run, evaluate=lambda params: broken)

    with pytest.raises(UserError, match="the test loss held inf or NaN after step 2"):
        train(run, state)


def final_params(folder: Path, seed: int | None) -> Params:
    run, state, _ = start(folder, {"train.seed": seed, "train.num_steps": 1})
    train(run, state)
    assert run.streams.seeded is (seed is not None)
    return state.params


def test_a_seed_repeats_a_run_and_no_seed_does_not(tmp_path: Path) -> None:
    seeded = [final_params(tmp_path / str(i), 3) for i in range(2)]
    other = final_params(tmp_path / "other", 4)
    unseeded = [final_params(tmp_path / str(i), None) for i in range(2, 4)]

    assert_same(seeded[0], seeded[1])
    name = next(iter(other))
    for one, two in ((seeded[0], other), (unseeded[0], unseeded[1])):
        assert not torch.equal(one[name], two[name])


def test_a_stop_request_saves_and_returns(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, {"runtime.checkpoint_every": 100})
    outcome = train(run, state, stop_requested=lambda: state.step == 3)

    assert (outcome, state.step) == ("interrupted", 3)
    assert (tmp_path / "step-00000003.safetensors").exists()


def test_a_stop_request_in_the_last_step_finishes(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)

    assert train(run, state, stop_requested=lambda: state.step == 4) == "finished"
