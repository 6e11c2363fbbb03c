"""Runs of a linear model whose gradients are known exactly: a step takes a millisecond.

The parts are the real ones: sampler, loader, engine, noise, update, `train_step`. An
example is a row of some numbers in [-1, 1], held as an image of as many pixels; its
gradient is the row, a hundred times. So one step releases

    (sum of rows, each clipped, + noise) / expected_batch_size

which the weights show, as the learning rate is 1 and they begin at 0.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from small_runs import small_config
from torch import Tensor, nn

import dpsgd.train
from dpsgd.clipping import clipped_grad
from dpsgd.data import ImageDataset, PoissonSampler, ViewLoader
from dpsgd.optim import Optimizer
from dpsgd.parallel import Ranks, laid_out
from dpsgd.privacy import DPSGDMechanism, PrivacyLedger, PRVAccountant
from dpsgd.rng import RandomStreams
from dpsgd.run import Run, TrainState
from dpsgd.trees import Params

GAIN = 100.0
_ZERO = 127  # pixel whose value is 0
_SETTINGS = {
    "optimizer.learning_rate": 1.0,
    "ema.decay": None,
    "data.mean": (_ZERO / 255,),
    "data.std": (0.5,),
}

Rows = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class FixedDraw:
    """A sampler that always draws the same rows."""

    rows: NDArray[np.int64]
    sample_rate: float

    def draw(self, step: int) -> NDArray[np.int64]:
        return self.rows


def with_draw(run: Run, rows: Any) -> Run:
    """The run, with the rows that every step draws."""
    draw = FixedDraw(np.asarray(rows, np.int64), run.mechanism.sample_rate)
    return dataclasses.replace(run, sampler=draw)


class Leaves(nn.Module):
    """Parameters of so many rows, all zeros, and nothing that computes."""

    def __init__(self, rows: dict[str, int]) -> None:
        super().__init__()
        for name, count in rows.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(count)))


def linear_loss(params: Params, views: Tensor, label: Tensor) -> Tensor:
    """Its gradient is the mean view, cut in two leaves; the leaf `idle` has none."""
    weights = torch.cat([params["first"], params["late"]])
    return GAIN * (views.flatten(1).mean(0) @ weights) + 0.0 * label


def toy_run(
    rows: Rows,
    *,
    noise_multiplier: float = 0.0,
    sample_rate: float = 0.5,
    expected_batch_size: float = 1.0,
    num_steps: int = 1,
    microbatch_size: int = 4,
    num_views: int = 1,
    num_idle: int = 1,
    seed: int = 0,
    ranks: Ranks | None = None,
    **changes: Any,
) -> tuple[Run, TrainState]:
    """A run on (N, W) rows, whose leaf `idle` shows noise alone; C is 1.

    `changes` are of settings, named `section__key`.
    """
    config = small_config(
        {
            **_SETTINGS,
            "data.augmentation_multiplicity": num_views,
            "train.num_steps": num_steps,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
    )
    mechanism = DPSGDMechanism(
        sample_rate=sample_rate,
        num_steps=num_steps,
        noise_multiplier=noise_multiplier,
        clipping_norm=1.0,
        expected_batch_size=expected_batch_size,
        delta=1e-5,
    )
    streams = RandomStreams.from_seed(seed)
    ranks = ranks or Ranks()
    leaves = {"first": rows.shape[1] - 2, "idle": num_idle, "late": 2}
    model = Leaves(leaves).to(ranks.device)
    layout, params = laid_out(model, ranks, config.runtime.parallel)
    run = Run(
        config=config,
        mechanism=mechanism,
        ledger=PrivacyLedger(mechanism, PRVAccountant()),
        streams=streams,
        sampler=PoissonSampler(
            num_rows=len(rows), sample_rate=sample_rate, streams=streams
        ),
        load_views=ViewLoader(
            toy_images(rows),
            config=config.data,
            streams=streams,
            microbatch_size=microbatch_size,
            dtype=torch.float32,
            device=ranks.device,
            share=ranks.share,
        ),
        grad_fn=clipped_grad(linear_loss, clipping_norm=1.0),
        evaluate=lambda params: SimpleNamespace(accuracy=0.0, loss=0.0),
        secure_noise=None,
        layout=layout,
        frozen={},
        save=lambda state: None,
        keep_best=lambda step: None,
        unaccounted_step=None,
    )
    optimizer = Optimizer(params, config.optimizer, num_steps=num_steps)
    return run, TrainState(step=0, params=params, ema=None, optimizer=optimizer)


def toy_images(rows: Rows) -> ImageDataset:
    """Rows as images, rounded to the values that a pixel can have."""
    pixels = np.rint(_ZERO + 127 * rows).astype(np.uint8)
    images = torch.from_numpy(pixels)[:, None, None]  # (N, 1, 1, W)
    return ImageDataset(
        images=images, labels=torch.zeros(len(images), dtype=torch.int64)
    )


def toy_sum(rows: Rows, *, num_idle: int = 1) -> Rows:
    """The sum of clipped gradients, without the code that is tested; flat."""
    pixels = toy_images(rows).images.flatten(1).double().numpy()
    gradients = GAIN * (pixels - _ZERO) / 255 / 0.5
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    total = (gradients / np.maximum(norms, 1.0)).sum(0)
    return np.concatenate([total[:-2], np.zeros(num_idle), total[-2:]])


def released_sum(run: Run, state: TrainState) -> Params:
    """Takes a step, and returns what it released, times the public divisor."""
    before = {name: leaf.clone() for name, leaf in state.params.items()}
    dpsgd.train.train_step(run, state)
    size = run.mechanism.expected_batch_size
    return {
        name: (before[name].double() - leaf.double()) * size
        for name, leaf in state.params.items()
    }


def flat(leaves: Params) -> NDArray[np.float64]:
    """All leaves as one vector, in the order of their names."""
    parts = [leaves[name].double().flatten() for name in sorted(leaves)]
    return torch.cat(parts).numpy()
