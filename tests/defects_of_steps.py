"""Defects of what a step draws, divides by and counts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from planting import Defect, Patch, defect_of, patch_release

import dpsgd.train
from dpsgd.checkpoint import Checkpoint, CheckpointStore
from dpsgd.data import PoissonSampler
from dpsgd.privacy import DPSGDMechanism, Phase
from dpsgd.run import Run, TrainState
from dpsgd.trees import Params

DEFECTS: dict[str, Defect] = {}
defect = partial(defect_of, DEFECTS)


def patch_draws(
    patch: Patch, change: Callable[[PoissonSampler, NDArray[np.int64], int], Any]
) -> None:
    """Puts other draws in the place of Poisson ones."""
    draw = PoissonSampler.draw

    def changed(self: PoissonSampler, step: int) -> NDArray[np.int64]:
        return np.asarray(change(self, draw(self, step), step), np.int64)

    patch.setattr(PoissonSampler, "draw", changed)


@defect("batches are shuffled, of one size", "draws_are_poisson")
def shuffled_batches(patch: Patch) -> None:
    def change(
        sampler: PoissonSampler, _: NDArray[np.int64], step: int
    ) -> NDArray[np.int64]:
        size = round(sampler.sample_rate * sampler.num_rows)
        epoch, batch = divmod(step, sampler.num_rows // size)
        order = np.random.default_rng(epoch).permutation(sampler.num_rows)
        return np.sort(order[batch * size :][:size])

    patch_draws(patch, change)


def patch_step(patch: Patch, change: Callable[..., Any]) -> None:
    """Puts `change(take_step, run, state)` in the place of a step."""
    take_step = dpsgd.train.train_step
    patch.setattr(
        dpsgd.train, "train_step", lambda run, state: change(take_step, run, state)
    )


@defect("the divisor is the size of the draw", "the_divisor_is_public")
def divisor_is_the_size_of_the_draw(patch: Patch) -> None:
    sizes = [1]

    def take(take_step: Any, run: Run, state: TrainState) -> Any:
        sizes[0] = max(1, len(run.sampler.draw(state.step)))
        return take_step(run, state)

    def change(_: Params, mechanism: DPSGDMechanism, key: int) -> DPSGDMechanism:
        return replace(mechanism, expected_batch_size=float(sizes[0]))

    patch_step(patch, take)
    patch_release(patch, change)


@defect("empty draws are skipped", "an_empty_draw_is_noised_and_counted")
def empty_draws_are_skipped(patch: Patch) -> None:
    def take(take_step: Any, run: Run, state: TrainState) -> Any:
        if len(run.sampler.draw(state.step)):
            return take_step(run, state)
        state.step += 1
        return []

    patch_step(patch, take)


@defect(
    "a resumed run forgets its steps",
    "a_resumed_run_takes_only_the_steps_that_are_left",
)
def resumed_run_forgets_its_steps(patch: Patch) -> None:
    newest = CheckpointStore.newest

    def forgetful(self: CheckpointStore) -> Checkpoint:
        checkpoint = newest(self)
        return Checkpoint(checkpoint.tensors, {**checkpoint.facts, "step": 0})

    patch.setattr(CheckpointStore, "newest", forgetful)


@defect(
    "epsilon follows from a rounded number of examples",
    "epsilon_is_that_of_the_declared_size",
)
def epsilon_of_a_rounded_size(patch: Patch) -> None:
    phase = DPSGDMechanism.phase

    def rounded(self: DPSGDMechanism, num_steps: int | None = None) -> Phase:
        size = round(self.expected_batch_size / self.sample_rate + 50, -2)
        exact = phase(self, num_steps)
        return replace(exact, sample_rate=self.expected_batch_size / size)

    patch.setattr(DPSGDMechanism, "phase", rounded)
