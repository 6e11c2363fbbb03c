"""Defects of the noise: its size, its repetition, and its part on every rank."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from planting import Defect, Patch, defect_of, noisy, patch_release, without_noise
from torch import Tensor

from dpsgd.clipping import PassStatistics, VmapClippedGrad
from dpsgd.parallel import Layout, Ranks
from dpsgd.privacy import DPSGDMechanism
from dpsgd.trees import Params

DEFECTS: dict[str, Defect] = {}
defect = partial(defect_of, DEFECTS)


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
