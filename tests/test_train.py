import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import dpsgd_train, read_lines, small_config, start, write_config
from torch import Tensor
from torch.func import functional_call
from toy_runs import with_draw

import dpsgd.train
from dpsgd.clipping import clipped_grad
from dpsgd.config import Config
from dpsgd.data import (
    DataSplits,
    ImageDataset,
    PoissonSampler,
    draw_views,
    load_datasets,
    make_views,
    microbatches,
)
from dpsgd.errors import BudgetExceededError, UserError
from dpsgd.kernels import add_gaussian_noise_
from dpsgd.models import build_model, initialize, per_example_loss
from dpsgd.privacy import PrivacyLedger, PRVAccountant
from dpsgd.run import EvaluationRecord, Run, StepRecord, TrainState
from dpsgd.train import train, train_step
from dpsgd.trees import Params

UNPROTECTED = {
    "realized_batch_size",
    "train_loss",
    "mean_gradient_norm",
    "clipped_share",
    "num_nonfinite",
}
# One-ulp differences of float32 sums, grown over a few steps of learning rate 0.5.
ROUNDING = 1e-5


def copies(params: Params) -> Params:
    return {name: leaf.clone() for name, leaf in params.items()}


def l2_norm(leaves: Params) -> float:
    return float(torch.cat([leaf.flatten() for leaf in leaves.values()]).norm())


def assert_same(first: Params, second: Params, tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        torch.testing.assert_close(leaf, second[name], rtol=0, atol=tolerance)


def network(config: Config, run: Run) -> torch.nn.Module:
    model = build_model(config.model, image_shape=(1, 8, 8), num_classes=10)
    initialize(model, run.streams.generator("init"))
    return model


def views_of_step(
    config: Config, run: Run, step: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Padded views, labels and mask of one step, from the parts of the data room."""
    train_set = load_datasets(config.data).train
    draw = run.sampler.draw(step)
    parameters = draw_views(
        run.streams.generator("augmentation", step),
        len(draw),
        augmentation=config.data.augmentation,
        crop_padding=config.data.crop_padding,
        augmentation_multiplicity=config.data.augmentation_multiplicity,
    )
    for part in microbatches(draw, 16):
        views = make_views(
            train_set.images[part.rows],
            parameters.microbatch(part.start, 16),
            mean=config.data.mean,
            std=config.data.std,
        )
        yield views, train_set.labels[part.rows], torch.from_numpy(part.mask)


TWO_VIEWS = {
    "data.augmentation": "crop_flip",
    "data.crop_padding": 1,
    "data.augmentation_multiplicity": 2,
    "privacy.clipping_norm": 0.7,
    "runtime.microbatch_size": 16,
}


@pytest.mark.parametrize("warmup", [10.0, 3.0])
def test_train_step_is_algorithm_1_bit_for_bit(tmp_path: Path, warmup: float) -> None:
    run, state, _ = start(tmp_path, {**TWO_VIEWS, "ema.warmup": warmup})
    config = run.config
    loss_fn = per_example_loss(network(config, run))
    grad_fn = clipped_grad(
        loss_fn, clipping_norm=0.7, rescale_to_unit_norm=True, engine="ghost"
    )
    params, ema = copies(state.params), copies(state.params)
    for step in range(3):
        total = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        for views, labels, mask in views_of_step(config, run, step):
            grad_fn.accumulate(total, params, views, labels, mask=mask)
        key = run.streams.noise_key(step)
        for leaf, name in enumerate(sorted(params)):
            # sigma = 1, and the sensitivity of the rescaled sum is 1
            add_gaussian_noise_(total[name], std=1.0, key=key, leaf=leaf)
            params[name] = params[name] - 0.5 * (total[name] / 16)
            weight = 1 - min(0.9, (1 + step) / (warmup + step))
            ema[name] = torch.lerp(ema[name], params[name], weight)
        train_step(run, state)

    assert state.step == 3
    assert_same(state.params, params)
    assert state.ema is not None
    assert_same(state.ema, ema)


def test_clipped_sum_is_that_of_a_loop_over_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state, _ = start(tmp_path, TWO_VIEWS)
    sums = record_releases(monkeypatch)
    params = copies(state.params)
    train_step(run, state)

    model = network(run.config, run)
    expected = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for views, labels, mask in views_of_step(run.config, run, 0):
        for example in mask.nonzero().flatten():
            leaves = {name: leaf.requires_grad_() for name, leaf in params.items()}
            logits = functional_call(model, leaves, (views[example],))
            loss = F.cross_entropy(logits, labels[example].expand(2))
            grads = torch.autograd.grad(loss, list(leaves.values()))
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            scale = min(1.0, 0.7 / float(norm)) / 0.7
            for total, grad in zip(expected.values(), grads, strict=True):
                total += scale * grad
    # The engine sums in another order than a loop: float32 rounding of about 16 terms.
    assert_same(sums[0]["clipped_sum"], expected, 2e-5)


def record_releases(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes every step leave its clipped sum, noise key and released gradient."""
    releases: list[dict[str, Any]] = []
    release = dpsgd.train.noisy_descent_

    def recorded(
        clipped_sum: Params, mechanism: Any, optimizer: Any, **settings: Any
    ) -> None:
        before = copies(clipped_sum)
        release(clipped_sum, mechanism, optimizer, **settings)
        releases.append(
            {
                "clipped_sum": before,
                "mechanism": mechanism,
                "noise_key": settings["noise_key"],
                "grads": copies(clipped_sum),  # it was made private in place
            }
        )

    monkeypatch.setattr(dpsgd.train, "noisy_descent_", recorded)
    return releases


def test_empty_draw_adds_noise_updates_and_counts(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)
    before = copies(state.params)
    passes = train_step(with_draw(run, []), state)

    assert passes == []
    assert state.step == 1
    assert run.ledger.epsilon_spent(state.step) > 0
    change = torch.cat([(state.params[n] - before[n]).flatten() for n in before])
    # learning rate 0.5, sigma 1, B 16; 78,650 draws have a std within 1 % (4 sigma)
    assert float(change.std()) == pytest.approx(0.5 / 16, rel=0.011)
    for leaf, name in enumerate(sorted(before)):
        noise = torch.zeros_like(before[name])
        key = run.streams.noise_key(0)
        add_gaussian_noise_(noise, std=1.0, key=key, leaf=leaf)
        expected = before[name] - 0.5 * (noise / 16)
        torch.testing.assert_close(state.params[name], expected, rtol=0, atol=0)


def test_a_tiny_sample_rate_trains_on_empty_draws(tmp_path: Path) -> None:
    changes = {"privacy.expected_batch_size": 0.001, "optimizer.learning_rate": 1e-5}
    run, state, _ = start(tmp_path, changes)

    assert [len(run.sampler.draw(step)) for step in range(4)] == [0, 0, 0, 0]
    assert train(run, state) == "finished"
    assert state.step == 4


def test_a_draw_larger_than_the_microbatch_is_accumulated(tmp_path: Path) -> None:
    states, rows = [], np.arange(0, 700, 7)
    for size, expected_passes in ((128, 1), (16, 7)):
        run, state, _ = start(tmp_path, {"runtime.microbatch_size": size})
        passes = train_step(with_draw(run, rows), state)
        assert len(passes) == expected_passes
        assert sum(int(one.num_examples) for one in passes) == 100
        states.append(state)

    # The sum has 100 terms of norm 1; the update is 0.5 / 16 of it.
    assert_same(states[0].params, states[1].params, ROUNDING)


def test_the_divisor_is_public_whatever_is_drawn(tmp_path: Path) -> None:
    changes = {"privacy.noise_multiplier": 0.0, "runtime.microbatch_size": 8}
    moved = []
    for rows in ([3], [3, 3], [3, 3, 3, 3]):
        run, state, _ = start(tmp_path, changes)
        before = copies(state.params)
        train_step(with_draw(run, rows), state)
        moved.append(l2_norm({n: state.params[n] - before[n] for n in before}))

    # One clipped gradient has norm 1 here: 0.5 / 16 for each example.
    assert moved == pytest.approx([1 / 32, 2 / 32, 4 / 32], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime.microbatch_size": 3},
        {"runtime.microbatch_size": 64},
        {"runtime.checkpoint_every": 3, "runtime.keep_checkpoints": 1},
        {"runtime.device": "auto"},
        {"eval.every": 1},
        {"report.unprotected_metrics": True},
    ],
)
def test_runtime_eval_and_report_change_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    run, reference, _ = start(tmp_path / "reference")
    train(run, reference)
    run, state, _ = start(tmp_path / "other", changes)
    train(run, state)

    device = next(iter(state.params.values())).device
    moved = {name: leaf.to(device) for name, leaf in reference.params.items()}
    assert_same(state.params, moved, ROUNDING)


class RecordedViews:
    """Hands on microbatches, and keeps what was not padding."""

    def __init__(self, load_views: Any) -> None:
        self._load_views = load_views
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, draw: Any, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        parts = list(self._load_views(draw, step))
        views = [views[mask] for views, _, mask in parts]
        labels = [labels[mask] for _, labels, mask in parts]
        self.steps.append((torch.cat(views), torch.cat(labels)))
        return parts


def neighbour(
    monkeypatch: pytest.MonkeyPatch, folder: Path, num_rows: int, changes: Any
) -> tuple[Run, TrainState, RecordedViews]:
    """Starts a run on 60 digits and, if there are 61 rows, an unusual example."""
    splits = load_datasets(small_config().data)
    images = torch.cat([splits.train.images[:60], torch.full((1, 1, 8, 8), 255)])
    images[60, :, ::2, ::2] = 0
    labels = torch.cat([splits.train.labels[:60], torch.tensor([9])])
    names = splits.train.class_names
    held = ImageDataset(
        images=images[:num_rows].to(torch.uint8),
        labels=labels[:num_rows],
        class_names=names,
    )
    data = DataSplits(train=held, test=splits.test)
    monkeypatch.setattr("dpsgd.assembly.load_datasets", lambda _: data)
    run, state, _ = start(folder, changes)
    views = RecordedViews(run.load_views)
    return dataclasses.replace(run, load_views=views), state, views


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("leader", ["without", "with"])
def test_neighbour_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leader: str, rescale: bool
) -> None:
    """Same randomness, one example more: both runs see the leader's parameters."""
    changes = {
        "data.num_examples": 64,
        "data.augmentation": "crop",
        "data.crop_padding": 1,
        "data.augmentation_multiplicity": 2,
        "privacy.delta": 1e-3,
        "privacy.clipping_norm": 0.5,
        "privacy.rescale_to_unit_norm": rescale,
        "train.num_steps": 8,
        "runtime.microbatch_size": 16,
    }
    run, state, views = neighbour(monkeypatch, tmp_path / "a", 60, changes)
    other, other_state, other_views = neighbour(
        monkeypatch, tmp_path / "b", 61, changes
    )
    assert other.mechanism == run.mechanism
    assert other.ledger.max_steps == run.ledger.max_steps == 8
    releases = record_releases(monkeypatch)
    differences = []
    for step in range(8):
        leading, following = (
            (state, other_state) if leader == "without" else (other_state, state)
        )
        for name, leaf in following.params.items():
            leaf.copy_(leading.params[name])
        train_step(run, state)
        train_step(other, other_state)
        without, with_one = releases[-2:]
        difference = {
            name: with_one["clipped_sum"][name] - leaf
            for name, leaf in without["clipped_sum"].items()
        }
        differences.append(l2_norm(difference))
        draw, other_draw = run.sampler.draw(step), other.sampler.draw(step)
        np.testing.assert_array_equal(other_draw[other_draw < 60], draw)
        for mine, theirs in zip(views.steps[-1], other_views.steps[-1], strict=True):
            torch.testing.assert_close(theirs[: len(draw)], mine, rtol=0, atol=0)
            assert len(theirs) == len(other_draw)
        assert with_one["noise_key"] == without["noise_key"]
        for name in difference:
            # What is released differs by one example's part over the public B alone.
            apart = with_one["grads"][name] - without["grads"][name]
            torch.testing.assert_close(
                apart, difference[name] / 16, rtol=0, atol=ROUNDING
            )
            apart = other_state.params[name] - state.params[name]
            torch.testing.assert_close(
                apart, -0.5 * difference[name] / 16, rtol=0, atol=ROUNDING
            )

    bound = 1.0 if rescale else 0.5
    assert run.grad_fn.l2_sensitivity == bound
    assert max(differences) <= bound * (1 + 1e-5)
    assert max(differences) > 0.99 * bound  # the example was drawn, and is clipped
    assert min(differences) == 0  # in some step it was not drawn
    keys = [one["noise_key"] for one in releases]
    assert len(set(keys)) == 8


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


class Watcher:
    """Keeps what it is told."""

    def __init__(
        self,
        evaluations: list[EvaluationRecord] | None = None,
        steps: list[StepRecord] | None = None,
    ) -> None:
        self.evaluations = [] if evaluations is None else evaluations
        self.steps = [] if steps is None else steps

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)


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


def test_both_weights_are_evaluated(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)
    watcher = Watcher()
    train(run, state, [watcher])

    record = watcher.evaluations[-1]
    assert [one.step for one in watcher.evaluations] == [2, 4]
    assert state.ema is not None
    assert record.last == run.evaluate(state.params)
    assert record.ema == run.evaluate(state.ema)
    assert record.ema != record.last
    best = [max(r.last.accuracy, r.ema.accuracy) for r in watcher.evaluations if r.ema]
    assert state.best_accuracy == max(best)


def test_without_an_average_only_the_last_weights_are_evaluated(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, {"ema.decay": None, "train.num_steps": 1})
    watcher = Watcher()
    train(run, state, [watcher])

    assert state.ema is None
    assert watcher.evaluations[0].ema is None
    assert state.best_accuracy == watcher.evaluations[0].last.accuracy


def test_an_evaluation_is_told_when_its_checkpoint_is_on_disk(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, {"runtime.checkpoint_every": 100})
    seen = {}

    class Looker(Watcher):
        def on_evaluation(self, record: EvaluationRecord) -> None:
            seen[record.step] = sorted(path.name for path in tmp_path.iterdir())

    train(run, state, [Looker()])

    assert "step-00000002.safetensors" in seen[2]
    assert "step-00000004.safetensors" in seen[4]
    assert "best.safetensors" in seen[2]


def test_steps_are_told_with_an_epsilon_that_never_falls(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path)
    watcher = Watcher()
    train(run, state, [watcher])

    epsilons = [record.epsilon for record in watcher.steps]
    assert [record.step for record in watcher.steps] == [1, 2, 3, 4]
    assert epsilons == sorted(epsilons)
    for record in watcher.steps:
        assert record.epsilon >= run.ledger.epsilon_exactly(record.step) * 0.999
    assert all(record.unprotected is None for record in watcher.steps)
    assert all(record.views_per_second > 0 for record in watcher.steps)


def test_unprotected_values_are_right_when_asked_for(tmp_path: Path) -> None:
    changes = {"report.unprotected_metrics": True, "runtime.microbatch_size": 3}
    run, state, _ = start(tmp_path, changes)
    params = copies(state.params)
    draw = run.sampler.draw(0)
    watcher = Watcher()
    train(run, state, [watcher])

    data = load_datasets(run.config.data).train
    views = (data.images[draw].float() / 255 - 0.5) / 0.5
    grads = clipped_grad(per_example_loss(network(run.config, run)), clipping_norm=1.0)(
        params, views[:, None], data.labels[draw]
    )
    told = watcher.steps[0].unprotected
    assert told is not None
    assert told.keys() == UNPROTECTED
    assert told["realized_batch_size"] == len(draw)
    assert told["train_loss"] == pytest.approx(float(grads.losses.mean()), rel=1e-4)
    mean_norm = float(grads.per_sample_norms.mean())
    assert told["mean_gradient_norm"] == pytest.approx(mean_norm, rel=1e-4)
    clipped = float((grads.per_sample_norms > 1).float().mean())
    assert told["clipped_share"] == pytest.approx(clipped)
    assert told["num_nonfinite"] == 0


def test_an_empty_draw_has_unprotected_values_too(tmp_path: Path) -> None:
    run, state, _ = start(tmp_path, {"report.unprotected_metrics": True})
    watcher = Watcher()
    train(with_draw(run, []), state, [watcher])

    assert watcher.steps[0].unprotected == {"realized_batch_size": 0.0}


@pytest.mark.parametrize("asked", [False, True])
def test_unprotected_values_appear_only_when_asked_for_and_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    config = write_config(tmp_path, {"report.unprotected_metrics": asked})
    assert dpsgd_train(config, "--run-dir", tmp_path / "run") == 0

    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    labelled = [line for line in lines if "unprotected" in line]
    assert len(labelled) == (4 if asked else 0)
    for line in labelled:
        assert line.keys() == {"step", "unprotected"}
        assert line["unprotected"].keys() == UNPROTECTED
    plain = json.dumps([line for line in lines if "unprotected" not in line])
    shown = capsys.readouterr().out
    report = (tmp_path / "run" / "report.json").read_text()
    for text in (plain, shown, report):
        assert not [name for name in UNPROTECTED if name in text]


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
