"""One-run audits: canaries go through a real run, and what it released is examined.

The run is the one that `assemble` builds: its sampler, loader, engine, noise, update
and loop. Only its data set and its loss know of canaries, so that a defect anywhere on
the path reaches the scores. Its weights have learned from canaries: they are never
written, and must never be released.

Gradient canaries are audited with a white box: the auditor sees the weights after every
step, and knows every example and every draw but those of the canaries themselves.
Image canaries are audited with a black box: the auditor sees the first and the last
weights. The account's claim covers both auditors.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from dpsgd.config import Config
from dpsgd.data import (
    DataSplits,
    GradientCanaries,
    ImageDataset,
    ViewLoader,
    draw_coins,
    extended,
    held_in_memory,
    mislabelled,
    normalize,
    require_room,
)
from dpsgd.errors import ConfigError, fault
from dpsgd.optim import learning_rate_at
from dpsgd.privacy import AuditResult, examine
from dpsgd.run import EvaluationRecord, Observer, Run, StepRecord, TrainState
from dpsgd.train import train
from dpsgd.trees import zeros_like

__all__ = ["audit", "audited_config", "require_auditable"]

_LOSSES_AT_ONCE = 500


def audited_config(config: Config, num_gradient_canaries: int) -> Config:
    """Returns the settings of a run that canaries can be planted into.

    Gradient canaries use layers' own parameters outside of the layers, too, of which
    the ghost engine would measure a part and so refuses them: their runs take the other
    one. Image canaries leave the engine as it is.

    Args:
        config: Of the run to be audited.
        num_gradient_canaries: Canaries with a gradient of their own, >= 0.
    """
    if not num_gradient_canaries:
        return config
    runtime = dataclasses.replace(config.runtime, engine="vmap")
    return dataclasses.replace(config, runtime=runtime)


def require_auditable(
    run: Run,
    state: TrainState,
    splits: DataSplits,
    *,
    num_gradient_canaries: int,
    num_image_canaries: int,
) -> None:
    """Raises where an audit with the same arguments would, before anything is begun.

    Args:
        run: As of `audit`.
        state: As of `audit`.
        splits: As of `audit`.
        num_gradient_canaries: As of `audit`.
        num_image_canaries: As of `audit`.

    Raises:
        ConfigError: There are too many canaries, or none, or the update rule hides
            what was released, or canaries cannot be planted among the images.
    """
    _check(run.config, num_gradient_canaries, num_image_canaries)
    held_in_memory(splits.train)  # canaries are planted among its images
    require_room(
        held_in_memory(splits.test),
        state.params,
        num_image_canaries=num_image_canaries,
        num_gradient_canaries=num_gradient_canaries,
    )


def audit(
    run: Run,
    state: TrainState,
    splits: DataSplits,
    *,
    num_classes: int,
    num_gradient_canaries: int,
    num_image_canaries: int,
    confidence: float,
    observers: Sequence[Observer] = (),
) -> AuditResult:
    """Plants canaries into a run, takes all its steps, and guesses which were in.

    Args:
        run: Assembled for this audit alone, of `audited_config`: its engine learns the
            canaries' loss.
        state: Its state before the first step; changed in place.
        splits: Its data.
        num_classes: Outputs of its network.
        num_gradient_canaries: Canaries with a gradient of their own, >= 0.
        num_image_canaries: Mislabelled images of the test set, >= 0.
        confidence: Of each lower bound, in (0, 1).
        observers: Told of every step.

    Raises:
        ConfigError: As of `require_auditable`.
    """
    require_auditable(
        run,
        state,
        splits,
        num_gradient_canaries=num_gradient_canaries,
        num_image_canaries=num_image_canaries,
    )
    rng = run.streams.generator("canaries")
    device = next(iter(state.params.values())).device
    test = held_in_memory(splits.test)
    images = mislabelled(rng, test, num_image_canaries, num_classes)
    gradients = GradientCanaries.draw(
        rng,
        state.params,
        num_canaries=num_gradient_canaries,
        first_label=num_classes,
        clipping_norm=run.mechanism.clipping_norm,
    )
    image_coins = draw_coins(rng, num_image_canaries)
    gradient_coins = draw_coins(rng, num_gradient_canaries)
    known = extended(held_in_memory(splits.train), images, image_coins)
    records = gradients.records(known.image_shape)
    loss_of_images = _loss_of(images.to(device), run)
    rows = extended(known, records, gradient_coins)
    run = _planted(run, rows.placed(device), gradients)
    # Without canaries nothing is read off, and no example need be known.
    num_known = len(known) if num_gradient_canaries else 0
    released = _ReleasedGradients(run, state, gradients, num_known=num_known)
    before = loss_of_images(state)
    train(run, state, [released, *observers])
    fell = before - loss_of_images(state)
    found = {
        "gradients": (released.along, gradient_coins),
        "images": (fell, image_coins),
    }
    return _examined(run, state, found, confidence)


def _examined(
    run: Run,
    state: TrainState,
    found: Mapping[str, tuple[Tensor, NDArray[np.bool_]]],
    confidence: float,
) -> AuditResult:
    """Returns what scores and coins of every kind show, beside the run's claim."""
    claim, delta = run.ledger.epsilon_exactly(state.step), run.mechanism.delta
    canaries = {
        kind: examine(
            scores.double().cpu().numpy(),
            is_in,
            epsilon=claim,
            delta=delta,
            confidence=confidence,
        )
        for kind, (scores, is_in) in found.items()
        if len(is_in)
    }
    return AuditResult(
        epsilon=claim,
        delta=delta,
        confidence=confidence,
        num_steps=state.step,
        canaries=canaries,
    )


def _check(config: Config, *numbers: int) -> None:
    """Raises unless there are canaries, and released gradients can be told."""
    if min(numbers) < 0 or not any(numbers):
        rule = "must be at least 0, and one of them above"
        shown = " and ".join(map(str, numbers))
        raise ConfigError(fault("canaries", shown, rule, "raise them"))
    if not config.privacy.enabled:
        rule = "a run without privacy claims nothing that could be refuted"
        raise ConfigError(fault("privacy.enabled", False, rule, "audit a private run"))
    if config.runtime.feature_cache is not None:
        rule = "canaries have no features in it"
        path = config.runtime.feature_cache
        raise ConfigError(fault("runtime.feature_cache", path, rule, "remove it"))
    if config.privacy.unit != "example":
        rule = "canaries are examples, and tell nothing of whole users"
        remedy = "audit the run with privacy.unit=example"
        raise ConfigError(fault("privacy.unit", config.privacy.unit, rule, remedy))
    if config.optimizer.name != "sgd":
        rule = "the auditor reads gradients off the weights, which only SGD shows"
        remedy = "set it to sgd"
        raise ConfigError(fault("optimizer.name", config.optimizer.name, rule, remedy))


def _planted(run: Run, rows: ImageDataset, gradients: GradientCanaries) -> Run:
    """Returns the run on other rows; its parts are its own, and nothing is written."""
    assert isinstance(run.load_views, ViewLoader)  # which loads examples, not users
    if len(gradients):
        run.grad_fn.loss_fn = gradients.loss_fn(run.grad_fn.loss_fn)
    return dataclasses.replace(
        run,
        sampler=dataclasses.replace(run.sampler, num_rows=len(rows)),
        load_views=run.load_views.holding(rows),
        save=lambda state: None,
        keep_best=lambda step: None,
    )


class _ReleasedGradients:
    """Reads every released gradient off the weights, along the canaries' directions.

    What the known examples of a step contributed is subtracted: the auditor knows the
    weights, the examples and their draw, so it knows their clipped gradients.

    Attributes:
        along: (m,) sum over the steps, in units of one canary's contribution: noise of
            standard deviation `noise_multiplier` a step, plus 1 for each step that
            drew the canary.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        gradients: GradientCanaries,
        *,
        num_known: int,
    ) -> None:
        self._run = run
        self._state = state
        self._gradients = gradients
        self._num_known = num_known
        self.along = torch.zeros_like(gradients.along(state.params))
        self._momentum = torch.zeros_like(self.along)
        self._look()

    def on_step(self, record: StepRecord) -> None:
        """Adds what the step released, and prepares the next."""
        config, mechanism = self._run.config, self._run.mechanism
        rate = learning_rate_at(
            record.step - 1, config.optimizer, num_steps=config.train.num_steps
        )
        weights = self._gradients.along(self._state.params)
        moved = (self._weights - weights) / rate
        decayed = config.optimizer.weight_decay * self._weights
        grad = moved - config.optimizer.momentum * self._momentum - decayed
        self._momentum = moved
        released_sum = grad * mechanism.expected_batch_size
        self.along += (released_sum - self._known) / mechanism.l2_sensitivity
        if record.step < self._run.ledger.max_steps:
            self._look()

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Needs nothing of it."""
        del record

    def _look(self) -> None:
        """Notes the weights, and what the known examples are about to contribute."""
        run, params = self._run, self._state.params
        draw = run.sampler.draw(self._state.step)
        total = zeros_like(params)
        known = draw[draw < self._num_known]
        for *batch, mask in run.load_views(known, self._state.step):
            run.grad_fn.accumulate(total, params, *batch, mask=mask)
        self._weights = self._gradients.along(params)
        self._known = self._gradients.along(total)


def _loss_of(images: ImageDataset, run: Run) -> Callable[[TrainState], Tensor]:
    """Returns what measures the loss of each image, under averaged weights if any."""
    config, loss_fn = run.config, run.grad_fn.loss_fn
    views = normalize(
        images.images,
        mean=config.data.mean,
        std=config.data.std,
        dtype=getattr(torch, config.model.compute_dtype),
    )[:, None]  # (m, 1, C, H, W)
    losses = vmap(loss_fn, (None, 0, 0), chunk_size=_LOSSES_AT_ONCE)

    @torch.no_grad()
    def measured(state: TrainState) -> Tensor:
        if not len(images):
            return views.new_zeros(0)
        params = state.params if state.ema is None else state.ema
        return losses(params, views, images.labels)

    return measured
