r"""Canaries: records that an audit adds to a data set, each by its own fair coin.

An audited run learns from the data set and from the canaries whose coin says "in"; the
auditor guesses the coins from what the run released. Canaries are *added*: the run has
more rows than the data set, while `num_examples` N stays what was declared, and with it
the sample rate, the divisor and the claimed epsilon. This is the neighbourhood of the
account: its claim holds for every data set, of any number of rows, at the declared
constants, so it holds for the one with canaries, whatever the coins. Replacing rows
would ask for a claim about replacement, which nobody makes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.data.dataset import ImageDataset
from dpsgd.errors import ConfigError, fault
from dpsgd.trees import Params, num_elements

__all__ = ["GradientCanaries", "draw_coins", "extended", "mislabelled", "require_room"]

LossFn = Callable[..., Tensor]

# Far beyond the bound, so that a path that clips too little shows.
_TIMES_THE_BOUND = 10.0


def require_room(
    images: ImageDataset,
    params: Params,
    *,
    num_image_canaries: int,
    num_gradient_canaries: int,
) -> None:
    """Raises ConfigError where there is no image or parameter for every canary.

    Args:
        images: Where mislabelled images would be taken from.
        params: Trainable parameters, which would be dealt out.
        num_image_canaries: Mislabelled images, >= 0.
        num_gradient_canaries: Canaries with a gradient of their own, >= 0.
    """
    _require_images(images, num_image_canaries)
    _require_parameters(params, num_gradient_canaries)


def draw_coins(rng: np.random.Generator, num_canaries: int) -> NDArray[np.bool_]:
    """Returns (m,) fair coins, True where the canary is in the training set.

    Args:
        rng: Random generator that the run uses for nothing else.
        num_canaries: m >= 0.
    """
    return rng.random(num_canaries) < 0.5


def extended(
    dataset: ImageDataset, canaries: ImageDataset, is_in: NDArray[np.bool_]
) -> ImageDataset:
    """Returns the data set with the canaries that are in as its last rows.

    Rows at the end leave the draws and views of those before them as they were.

    Args:
        dataset: Any data set.
        canaries: (m) records with images of the same shape; their labels may lie
            beyond the declared classes, which the result therefore does not declare.
        is_in: (m,) coins.
    """
    kept = torch.from_numpy(np.flatnonzero(is_in))
    return ImageDataset(
        images=torch.cat([dataset.images, canaries.images[kept]]),
        labels=torch.cat([dataset.labels, canaries.labels[kept]]),
    )


def mislabelled(
    rng: np.random.Generator, images: ImageDataset, num_canaries: int, num_classes: int
) -> ImageDataset:
    """Returns images with wrong labels: only who trained on them finds these likely.

    Args:
        rng: Random generator that the run uses for nothing else.
        images: Where they are taken from, without replacement; not the training set,
            in which the same image would stand with its right label.
        num_canaries: Images wanted, m >= 0.
        num_classes: Each label is uniform over the others of so many, >= 2.

    Raises:
        ConfigError: There are fewer images than that.
    """
    _require_images(images, num_canaries)
    rows = torch.from_numpy(rng.permutation(len(images))[:num_canaries])
    shift = torch.from_numpy(rng.integers(1, num_classes, size=num_canaries))
    labels = (images.labels[rows] + shift) % num_classes
    return ImageDataset(images=images.images[rows], labels=labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientCanaries:
    """Records whose gradient is a known direction of the parameter space.

    The coordinates of all parameters are dealt out to the canaries at random, so many
    to each; a canary's direction has norm 1 and random signs on its own coordinates.
    So directions are orthogonal, no canary hides another, and together they look at
    every leaf.

    A canary is a row like any other: it is sampled, loaded, differentiated, clipped
    and summed by the run's own parts. Its label says which canary it is, its image is
    black and unused.

    Args:
        coordinates: (m, S) int64 positions among all parameters, flattened leaf after
            leaf in the order of their dict.
        signs: (m, S) float32, 1 or -1.
        first_label: Label of canary 0: the number of classes.
        clipping_norm: Bound C that the gradient passes ten times over.
    """

    coordinates: Tensor
    signs: Tensor
    first_label: int
    clipping_norm: float

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        params: Params,
        *,
        num_canaries: int,
        first_label: int,
        clipping_norm: float,
    ) -> "GradientCanaries":
        """Deals out the coordinates of `params`.

        Args:
            rng: Random generator that the run uses for nothing else.
            params: Trainable parameters, of whose device the canaries are.
            num_canaries: m >= 0.
            first_label: As of the class.
            clipping_norm: As of the class.

        Raises:
            ConfigError: There are more canaries than parameters.
        """
        _require_parameters(params, num_canaries)
        size = num_elements(params)
        share = size // max(1, num_canaries)
        dealt = rng.permutation(size)[: num_canaries * share]
        signs = 2.0 * rng.integers(2, size=(num_canaries, share)) - 1.0
        device = next(iter(params.values())).device
        return cls(
            coordinates=torch.from_numpy(dealt.reshape(num_canaries, share)).to(device),
            signs=torch.from_numpy(signs).to(device, torch.float32),
            first_label=first_label,
            clipping_norm=clipping_norm,
        )

    def __len__(self) -> int:
        return len(self.coordinates)

    def along(self, leaves: Params) -> Tensor:
        """Returns (m,) float64 inner products of `leaves` with every direction.

        Args:
            leaves: Like the parameters: weights, a gradient or a sum of gradients.
        """
        flat = torch.cat([leaf.flatten() for leaf in leaves.values()]).double()
        return (flat[self.coordinates] * self.signs).sum(1) / self._length

    def records(self, image_shape: tuple[int, int, int]) -> ImageDataset:
        """Returns the m records, as a data set holds them.

        Args:
            image_shape: (C, H, W) of the black images.
        """
        labels = self.first_label + torch.arange(len(self))
        images = torch.zeros((len(self), *image_shape), dtype=torch.uint8)
        return ImageDataset(images=images, labels=labels)

    def loss_fn(self, loss_fn: LossFn) -> LossFn:
        """Returns a loss that has the canaries' gradients where labels are theirs.

        Args:
            loss_fn: `loss_fn(params, views, label)` of all other examples; what it is
                given beyond that is passed on.
        """

        def loss(
            params: Params, views: Tensor, label: Tensor, *uniforms: Tensor
        ) -> Tensor:
            is_canary = label >= self.first_label
            canary = (label - self.first_label).clamp(min=0)[None]  # (1,)
            flat = torch.cat([leaf.flatten() for leaf in params.values()])
            along = (flat[self.coordinates[canary]] * self.signs[canary]).sum()
            pushed = along * (_TIMES_THE_BOUND * self.clipping_norm / self._length)
            no_canary = torch.where(is_canary, 0, label)
            other = loss_fn(params, views, no_canary, *uniforms)
            return torch.where(is_canary, pushed, other)

        return loss

    @property
    def _length(self) -> float:
        """Norm of the signs, by which a direction is divided."""
        return float(self.coordinates.shape[1] ** 0.5)


def _require_images(images: ImageDataset, num_canaries: int) -> None:
    """Raises unless there is an image for every canary."""
    if num_canaries > len(images):
        rule = f"canaries are images of the test set, which has {len(images)}"
        raise ConfigError(fault("--image-canaries", num_canaries, rule, "lower it"))


def _require_parameters(params: Params, num_canaries: int) -> None:
    """Raises unless there is a parameter for every canary."""
    size = num_elements(params)
    if num_canaries > size:
        rule = f"each needs a parameter of its own, and there are {size}"
        raise ConfigError(fault("--gradient-canaries", num_canaries, rule, "lower it"))
