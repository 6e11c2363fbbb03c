"""Two runs of the same randomness, of which one has one example more."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from observed_runs import ROUNDING, l2_norm, record_releases
from small_runs import small_config, start
from torch import Tensor

from dpsgd.data import DataSplits, ImageDataset, load_datasets
from dpsgd.run import Run, TrainState
from dpsgd.train import train_step


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
