"""A step is Algorithm 1, whatever is drawn and however the work is cut."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from observed_runs import (
    ROUNDING,
    assert_same,
    copies,
    l2_norm,
    network,
    record_releases,
)
from small_runs import start
from torch import Tensor
from torch.func import functional_call
from toy_runs import with_draw

from dpsgd.clipping import clipped_grad
from dpsgd.config import Config
from dpsgd.data import draw_views, load_datasets, make_views, microbatches
from dpsgd.kernels import add_gaussian_noise_
from dpsgd.models import per_example_loss
from dpsgd.run import Run
from dpsgd.train import train, train_step


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
