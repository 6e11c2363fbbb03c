"""Defects that have voided guarantees elsewhere, planted one by one into our code.

    python tests/planted_defects.py            # what each detector says of each defect
    python tests/planted_defects.py --write    # the same, into docs/audit.md

A defect replaces one function of the training path while it is planted, in this process
and in those that a detector starts. Of several ranks, two defects are planted where
ranks meet the noise, in its scale and in its counters, and one process plays both; four
are planted into two real ranks.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import detectors
import numpy as np
import pytest
import torch
from detectors import DETECTORS, Caught
from numpy.typing import NDArray
from small_runs import ROOT, remembering
from torch import Tensor

import dpsgd.clipping.ghost
import dpsgd.clipping.vmap
import dpsgd.train
from dpsgd.checkpoint import Checkpoint, CheckpointStore
from dpsgd.clipping import PassStatistics, VmapClippedGrad, per_sample_grads
from dpsgd.data import PoissonSampler
from dpsgd.kernels import add_gaussian_noise_
from dpsgd.parallel import Layout, Ranks
from dpsgd.privacy import DPSGDMechanism, Phase
from dpsgd.run import Run, TrainState
from dpsgd.trees import Params

Patch = pytest.MonkeyPatch
DOCUMENT = ROOT / "docs" / "audit.md"
_TABLE = re.compile(r"(?<=<!-- defects -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Defect:
    """A defect, how to plant it, and the detectors that must catch it."""

    name: str
    plant: Callable[[Patch], None]
    caught_by: tuple[str, ...]


DEFECTS: dict[str, Defect] = {}


def defect(name: str, *caught_by: str) -> Callable[..., Callable[[Patch], None]]:
    """Lists a planting function under a name, with the detectors it must not pass."""

    def listed(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        assert {*caught_by} <= {*DETECTORS}
        DEFECTS[plant.__name__] = Defect(name, plant, caught_by)
        return plant

    return listed


def patch_release(
    patch: Patch, change: Callable[[Params, DPSGDMechanism, int], DPSGDMechanism]
) -> None:
    """Shows `change` the sum before its noise; the mechanism it returns is released.

    Args:
        patch: Undone when the defect is pulled out.
        change: Takes the sum, which it may change, the mechanism and the noise key.
    """
    release = dpsgd.train.noisy_descent_

    def changed(
        clipped_sum: Params, mechanism: DPSGDMechanism, *rest: Any, **named: Any
    ) -> Any:
        mechanism = change(clipped_sum, mechanism, named["noise_key"])
        return release(clipped_sum, mechanism, *rest, **named)

    patch.setattr(dpsgd.train, "noisy_descent_", changed)


def without_noise(mechanism: DPSGDMechanism) -> DPSGDMechanism:
    """The mechanism of a release to which noise was added already."""
    return replace(mechanism, noise_multiplier=0.0)


def noisy(leaves: Iterable[Tensor], *, std: float, key: int) -> None:
    """Adds noise to tensors, each with a number of its own."""
    for leaf, total in enumerate(leaves):
        add_gaussian_noise_(total, std=std, key=key, leaf=leaf)


@defect("no noise", "noise_has_the_promised_size", "canaries_do_not_pass_the_claim")
def no_noise(patch: Patch) -> None:
    patch_release(patch, lambda total, mechanism, key: without_noise(mechanism))


@defect(
    "half of the noise",
    "noise_has_the_promised_size",
    "trials_of_a_step_do_not_pass_its_epsilon",
)
def half_of_the_noise(patch: Patch) -> None:
    def change(_: Params, mechanism: DPSGDMechanism, key: int) -> DPSGDMechanism:
        return replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)

    patch_release(patch, change)


@defect(
    "noise divided by the number of ranks",
    "noise_has_the_promised_size",
    "trials_of_a_step_do_not_pass_its_epsilon",
)
def noise_divided_by_ranks(patch: Patch) -> None:
    """Each of two ranks adds half of the noise, which sums to 0.71 of it."""

    def change(total: Params, mechanism: DPSGDMechanism, key: int) -> DPSGDMechanism:
        for rank in range(2):
            noisy(total.values(), std=mechanism.noise_std / 2, key=key ^ rank)
        return without_noise(mechanism)

    patch_release(patch, change)


@defect("the same noise on two ranks", "noise_does_not_repeat")
def same_noise_on_two_ranks(patch: Patch) -> None:
    """Each of two ranks holds half of every leaf, and counts its elements from 0."""

    def change(total: Params, mechanism: DPSGDMechanism, key: int) -> DPSGDMechanism:
        halves = (leaf.view(-1).tensor_split(2) for leaf in total.values())
        for shards in zip(*halves, strict=True):
            noisy(shards, std=mechanism.noise_std, key=key)
        return without_noise(mechanism)

    patch_release(patch, change)


@defect("the same noise in every step", "noise_does_not_repeat")
def same_noise_in_every_step(patch: Patch) -> None:
    def change(total: Params, mechanism: DPSGDMechanism, key: int) -> DPSGDMechanism:
        noisy(total.values(), std=mechanism.noise_std, key=7)
        return without_noise(mechanism)

    patch_release(patch, change)


def patch_total(patch: Patch, change: Callable[..., Params]) -> None:
    """Puts `change(total, layout, clipped_sum)` in the place of the sum over ranks."""
    total = Layout.total
    patch.setattr(Layout, "total", lambda *arguments: change(total, *arguments))


@defect("the mean over ranks is taken for the sum", "two_ranks_train_like_one")
def mean_over_ranks(patch: Patch) -> None:
    def change(total: Any, layout: Layout, clipped_sum: Params) -> Params:
        summed = total(layout, clipped_sum)
        return {name: leaf / layout.ranks.size for name, leaf in summed.items()}

    patch_total(patch, change)


@defect(
    "every rank adds noise of its own",
    "two_ranks_train_like_one",
    "noise_has_the_promised_size",
)
def noise_of_every_rank(patch: Patch) -> None:
    def change(total: Any, layout: Layout, clipped_sum: Params) -> Params:
        leaves = [clipped_sum[name] for name in sorted(clipped_sum)]
        noisy(leaves, std=1.0, key=layout.ranks.rank)
        return total(layout, clipped_sum)

    patch_total(patch, change)


@defect("shards count their noise from 0", "two_ranks_train_like_one")
def shards_count_from_zero(patch: Patch) -> None:
    patch.setattr(Layout, "offsets", {})


@defect("every rank takes the whole draw", "two_ranks_train_like_one")
def whole_draw_on_every_rank(patch: Patch) -> None:
    patch.setattr(Ranks, "share", lambda self, count: slice(0, count))


def patch_pass(patch: Patch, change: Callable[..., tuple[Tensor, ...]]) -> None:
    """Shows `change` the views, labels and mask of a pass; it returns what is taken."""
    accumulate = VmapClippedGrad.accumulate

    def changed(
        self: VmapClippedGrad, total: Params, params: Params, *batch: Tensor, mask: Any
    ) -> PassStatistics:
        *batch, mask = change(*batch, mask)
        return accumulate(self, total, params, *batch, mask=mask)

    patch.setattr(VmapClippedGrad, "accumulate", changed)


@defect("noise drawn again for every microbatch", "noise_has_the_promised_size")
def noise_for_every_microbatch(patch: Patch) -> None:
    accumulate = VmapClippedGrad.accumulate
    keys = iter(range(10**9))

    def changed(
        self: VmapClippedGrad, total: Params, *rest: Any, mask: Tensor
    ) -> PassStatistics:
        statistics = accumulate(self, total, *rest, mask=mask)
        noisy(total.values(), std=2.0, key=next(keys))
        return statistics

    patch.setattr(VmapClippedGrad, "accumulate", changed)


@defect(
    "the batch is averaged, then clipped",
    "one_example_moves_the_sum_by_at_most_the_sensitivity",
)
def clipping_after_averaging(patch: Patch) -> None:
    def accumulate(
        self: VmapClippedGrad, total: Params, params: Params, *batch: Tensor, mask: Any
    ) -> PassStatistics:
        grads, losses = per_sample_grads(self.loss_fn, params, *batch)
        means = {name: leaf[mask].mean(0) for name, leaf in grads.items()}
        norm = torch.cat([leaf.flatten() for leaf in means.values()]).norm()
        for name, leaf in means.items():
            total[name] += leaf * mask.sum() * (self.clipping_norm / norm).clamp(max=1)
        return PassStatistics(losses, losses, mask.sum() * 0, mask.sum())

    patch.setattr(VmapClippedGrad, "accumulate", accumulate)


@defect(
    "every view is clipped by itself",
    "one_example_moves_the_sum_by_at_most_the_sensitivity",
)
def clipping_every_view(patch: Patch) -> None:
    def change(views: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        num_views = views.shape[1]
        return (
            views.flatten(0, 1)[:, None],
            labels.repeat_interleave(num_views),
            mask.repeat_interleave(num_views),
        )

    patch_pass(patch, change)


@defect(
    "examples are centred on their batch, as batch normalisation does",
    "the_sum_is_that_of_single_examples",
    "one_example_moves_the_sum_by_at_most_the_sensitivity",
)
def examples_centred_on_their_batch(patch: Patch) -> None:
    def change(views: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return views - views[mask].mean(0), labels, mask

    patch_pass(patch, change)


@defect("padding is counted", "padding_contributes_nothing")
def padding_is_counted(patch: Patch) -> None:
    patch_pass(
        patch, lambda views, labels, mask: (views, labels, torch.ones_like(mask))
    )


def patch_norms(patch: Patch, change: Callable[[Params], Tensor]) -> None:
    """Puts other norms before the clipping."""
    patch.setattr(dpsgd.clipping.vmap, "per_sample_norms", change)


@defect(
    "a parameter that was added late is left out of the norm",
    "one_example_moves_the_sum_by_at_most_the_sensitivity",
)
def parameter_left_out_of_the_norm(patch: Patch) -> None:
    norms_of = dpsgd.clipping.vmap.per_sample_norms

    def change(grads: Params) -> Tensor:
        *names, _ = grads
        return norms_of({name: grads[name] for name in names})

    patch_norms(patch, change)


@defect(
    "a layer is left out of the ghost engine's norm",
    "norms_taken_layer_by_layer_bound_every_example",
)
def layer_left_out_of_the_ghost_norm(patch: Patch) -> None:
    norms_of = dpsgd.clipping.ghost._LayerByLayer.per_sample_norms

    def change(self: Any) -> Tensor:
        self._layers, layers = self._layers[1:], self._layers
        norms = norms_of(self)
        self._layers = layers
        return norms

    patch.setattr(dpsgd.clipping.ghost._LayerByLayer, "per_sample_norms", change)


@defect(
    "norms are cut to bfloat16",
    "one_example_moves_the_sum_by_at_most_the_sensitivity",
)
def norms_in_bfloat16(patch: Patch) -> None:
    norms_of = dpsgd.clipping.vmap.per_sample_norms

    def change(grads: Params) -> Tensor:
        bits = norms_of(grads).float().view(torch.int32)
        return (bits & -65_536).view(torch.float32)

    patch_norms(patch, change)


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


def told_by(name: str, planted: Defect | None) -> tuple[bool, str]:
    """Whether a detector catches a defect, and what it measured."""
    with Patch.context() as patch, remembering():
        if planted is not None:
            planted.plant(patch)
            patch.setattr(detectors, "plant_in_ranks", planted.plant)
        try:
            return False, DETECTORS[name]()
        except Caught as caught:
            return True, str(caught)


def rows_of_table() -> list[tuple[str, str, str]]:
    """One row for each defect and each detector that catches it, among all of them."""
    rows = []
    for planted in DEFECTS.values():
        found = {name: told_by(name, planted) for name in DETECTORS}
        caught = [(name, told) for name, (yes, told) in found.items() if yes]
        for number, (name, told) in enumerate(caught or [("nothing", "missed")]):
            rows.append(("" if number else planted.name, f"`{name}`", told))
    return rows


def main() -> int:
    """Prints the table, and writes it into the document if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update docs/audit.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of_table()
    head = ["| planted defect | caught by | what it says |", "|--|--|--|"]
    text = "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
    print(text)
    if arguments.write:
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(_TABLE.sub(lambda _: text, document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
