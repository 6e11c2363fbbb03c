"""How a defect is planted, and listed with the detectors that must catch it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from detectors import DETECTORS
from torch import Tensor

import dpsgd.train
from dpsgd.kernels import add_gaussian_noise_
from dpsgd.privacy import DPSGDMechanism
from dpsgd.trees import Params

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Defect:
    """A defect, how to plant it, and the detectors that must catch it."""

    name: str
    plant: Callable[[Patch], None]
    caught_by: tuple[str, ...]


def defect_of(
    defects: dict[str, Defect], name: str, *caught_by: str
) -> Callable[..., Callable[[Patch], None]]:
    """Lists a planting function under a name, with the detectors it must not pass."""

    def listed(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        assert {*caught_by} <= {*DETECTORS}
        defects[plant.__name__] = Defect(name, plant, caught_by)
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
