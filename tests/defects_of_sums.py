"""Defects of the clipped sum: what is clipped, by which norm, and what is added."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from planting import Defect, Patch, defect_of
from torch import Tensor

import dpsgd.clipping.ghost
import dpsgd.clipping.vmap
from dpsgd.clipping import PassStatistics, VmapClippedGrad, per_sample_grads
from dpsgd.trees import Params

DEFECTS: dict[str, Defect] = {}
defect = partial(defect_of, DEFECTS)


def patch_pass(patch: Patch, change: Callable[..., tuple[Tensor, ...]]) -> None:
    """Shows `change` the views, labels and mask of a pass; it returns what is taken."""
    accumulate = VmapClippedGrad.accumulate

    def changed(
        self: VmapClippedGrad, total: Params, params: Params, *batch: Tensor, mask: Any
    ) -> PassStatistics:
        *batch, mask = change(*batch, mask)
        return accumulate(self, total, params, *batch, mask=mask)

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
