"""What a run tells of its steps and evaluations, and what only when asked to."""

import json
from pathlib import Path

import pytest
from observed_runs import Watcher, copies, network
from small_runs import dpsgd_train, read_lines, start, write_config
from toy_runs import with_draw

from dpsgd.clipping import clipped_grad
from dpsgd.data import load_datasets
from dpsgd.models import per_example_loss
from dpsgd.run import EvaluationRecord
from dpsgd.train import train

UNPROTECTED = {
    "realized_batch_size",
    "train_loss",
    "mean_gradient_norm",
    "clipped_share",
    "num_nonfinite",
}


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
