"""From a draw of examples, or of users, to microbatches of views on the device."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd.config import DataConfig
from dpsgd.data.augmentation import (
    ViewParameters,
    cut_views,
    draw_views,
    pixel_levels,
)
from dpsgd.data.dataset import Dataset, upload
from dpsgd.data.fixed_views import FixedNumbers
from dpsgd.data.mixtures import draw_mixtures, mix_views
from dpsgd.data.sampling import microbatches
from dpsgd.data.users import UserExamples
from dpsgd.rng import RandomStreams

__all__ = ["LoadViews", "Share", "UserViewLoader", "ViewLoader", "everything"]

Share = Callable[[int], slice]

_FIXED_STREAMS = ("augmentation", "mixing")


def everything(count: int) -> slice:
    """Returns the share of a process that works alone: all of `count` things."""
    return slice(0, count)


class LoadViews(Protocol):
    """Turns the draw of a step into microbatches for the gradient engine."""

    def __call__(
        self, draw: NDArray[np.int64], step: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields the arguments of the loss, then mask (M,), False for padding.

        The first axis of each counts the M units of the microbatch. An empty draw
        yields nothing: its sum is zero, and noise is added all the same.

        Args:
            draw: Drawn units, each once.
            step: Step number, from which all that is random here follows.
        """
        ...


class ViewLoader:
    """Makes the K views of every drawn example, one microbatch at a time.

    Views are made for positions of the draw: those of a position are the same however
    the draw is split, and wherever its images come from. What is random in a step goes
    to the device before the first microbatch, with images that are held in memory, and
    nothing here waits for the device: it never runs out of work within a step.

    Args:
        dataset: Training examples.
        config: Augmentation, its multiplicity, and normalisation constants. With
            `fixed_views` an example has the same views in every step, which follow
            from its image alone.
        streams: Streams of the run, of which `augmentation` is used, `mixing` if
            views are mixed, and `stochastic_depth` if there are draws.
        microbatch_size: Examples M of every microbatch; the last one is padded.
        padded_to: The last one is padded to a multiple of this; None pads it to M.
        draws_per_view: Uniform numbers D that the network takes for each view.
        dtype: Type of the views.
        device: Where views are made.
        share: Which of so many drawn examples this process works on. Views are drawn
            for all of them, so that they do not depend on how a draw is shared.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        config: DataConfig,
        streams: RandomStreams,
        microbatch_size: int,
        padded_to: int | None = None,
        draws_per_view: int = 0,
        dtype: torch.dtype,
        device: torch.device,
        share: Share = everything,
    ) -> None:
        self._dataset = dataset
        self._config = config
        levels = pixel_levels(
            dataset.image_shape[0], mean=config.mean, std=config.std, dtype=dtype
        )
        self._levels = upload(levels, device)
        self._streams = streams
        self._microbatch_size = microbatch_size
        self._padded_to = padded_to
        self._draws_per_view = draws_per_view
        self._device = device
        self._share = share
        self._keys: NDArray[np.uint64] | None = None

    def holding(self, dataset: Dataset) -> Self:
        """Returns a loader of other examples, the same in all else."""
        other = copy.copy(self)
        other._dataset = dataset
        other._keys = None
        return other

    def __call__(
        self, draw: NDArray[np.int64], step: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields views (M, K, C, H, W), labels (M,) and mask (M,), False for padding.

        Where there are draws, uniform numbers (M, K, D) in [0, 1) stand before the
        mask, those of an example by its position in the draw, as its views are.

        An empty draw yields nothing: its sum is zero, and noise is added all the same.
        So does an empty share of a draw.

        Args:
            draw: Rows of the drawn examples, each once, the same for all who share.
            step: Step number, from which the augmentation follows.
        """
        own = self._share(len(draw))
        size = own.stop - own.start
        if size == 0:
            return
        num_drawn = len(draw)
        parameters = self._parameters(draw, step).microbatch(own.start, size)
        draw = draw[own]
        parts = list(
            microbatches(draw, self._microbatch_size, padded_to=self._padded_to)
        )
        rows = torch.from_numpy(np.concatenate([part.rows for part in parts]))
        mask = torch.from_numpy(np.concatenate([part.mask for part in parts]))
        mask = upload(mask, self._device)
        parameters = parameters.microbatch(0, len(rows))
        batches = self._dataset.batches(
            rows,
            [len(part.rows) for part in parts],
            crops=parameters.crops,
            device=self._device,
        )
        parameters = parameters.to(self._device)
        uniforms = self._uniforms(num_drawn, own, step, padded_length=len(rows))
        for part, (canvases, labels) in zip(parts, batches, strict=True):
            size = len(part.rows)
            place = slice(part.start, part.start + size)
            views = self._cut(canvases, parameters.microbatch(part.start, size))
            yield views, labels, *(one[place] for one in uniforms), mask[place]

    def _cut(self, canvases: Tensor, parameters: ViewParameters) -> Tensor:
        """Returns views (M, K, C, h, w) of canvases (M, J, C, H, W)."""
        size, num_canvases = canvases.shape[:2]
        images = canvases.flatten(0, 1)  # (M J, C, H, W)
        shared = parameters.shared_by(num_canvases)
        views = cut_views(images, self._levels, shared)  # (M J, K / J, C, h, w)
        views = views.reshape(size, -1, *views.shape[2:])  # (M, V, C, h, w)
        if parameters.mixtures is None:
            return views
        return mix_views(views, parameters.mixtures)

    def _parameters(self, draw: NDArray[np.int64], step: int) -> ViewParameters:
        """Draws the views of all examples of a step; mixtures are the last of them."""
        config = self._config
        num_views = config.augmentation_multiplicity - config.mixed_views
        parameters = draw_views(
            self._numbers("augmentation", draw, step),
            len(draw),
            augmentation=config.augmentation,
            crop_padding=config.crop_padding,
            augmentation_multiplicity=num_views,
            image_size=config.image_size,
        )
        if config.mixed_views == 0:
            return parameters
        mixtures = draw_mixtures(
            self._numbers("mixing", draw, step),
            len(draw),
            num_views=num_views,
            num_mixed=config.mixed_views,
        )
        return dataclasses.replace(parameters, mixtures=mixtures)

    def _numbers(
        self,
        stream: Literal["augmentation", "mixing"],
        draw: NDArray[np.int64],
        step: int,
    ) -> np.random.Generator | FixedNumbers:
        """Returns what a stream of a step is drawn from: the run's, or the images."""
        if not self._config.fixed_views:
            return self._streams.generator(stream, step)
        if self._keys is None:
            self._keys = self._dataset.image_keys()
        return FixedNumbers(self._keys[draw], stream=_FIXED_STREAMS.index(stream))

    def _uniforms(
        self, num_drawn: int, own: slice, step: int, *, padded_length: int
    ) -> tuple[Tensor, ...]:
        """Returns the uniform numbers of this share of a step, if any are wanted.

        Drawn for the whole draw, example after example, so that appending one leaves
        those before it as they were, however the draw is shared; a stream of their own,
        so that views do not depend on them.
        """
        if not self._draws_per_view:
            return ()
        rng = self._streams.generator("stochastic_depth", step)
        views = self._config.augmentation_multiplicity
        shape = (views, self._draws_per_view)
        uniforms = np.zeros((padded_length, *shape), np.float32)
        drawn = rng.random((num_drawn, *shape), dtype=np.float32)[own]
        uniforms[: len(drawn)] = drawn
        return (upload(torch.from_numpy(uniforms), self._device),)


@final
class UserViewLoader:
    """Makes the views of every drawn user's examples, one microbatch at a time.

    Args:
        dataset: Training examples, on any device, with their users.
        config: Augmentation, its multiplicity, and normalisation constants.
        streams: Streams of the run: `selection` and those of `ViewLoader` are used.
        max_examples: Most examples S of a user in one step.
        microbatch_size: Users M of every microbatch; the last one is padded.
        padded_to: The last one is padded to a multiple of this; None pads it to M.
        draws_per_view: As for `ViewLoader`.
        dtype: Type of the views.
        device: Where views are made.
        share: Which of so many drawn users this process works on.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        config: DataConfig,
        streams: RandomStreams,
        max_examples: int,
        microbatch_size: int,
        padded_to: int | None = None,
        draws_per_view: int = 0,
        dtype: torch.dtype,
        device: torch.device,
        share: Share = everything,
    ) -> None:
        assert dataset.users is not None
        self._users = UserExamples(dataset.users)
        self._streams = streams
        self._max_examples = max_examples
        self._microbatch_size = microbatch_size
        self._device = device
        self._share = share
        self._load_examples = ViewLoader(
            dataset,
            config=config,
            streams=streams,
            microbatch_size=microbatch_size * max_examples,
            padded_to=None if padded_to is None else padded_to * max_examples,
            draws_per_view=draws_per_view,
            dtype=dtype,
            device=device,
            share=self._share_of_examples,
        )

    def _share_of_examples(self, count: int) -> slice:
        """Returns which drawn examples this process works on: those of its users."""
        users = self._share(count // self._max_examples)
        return slice(users.start * self._max_examples, users.stop * self._max_examples)

    def __call__(
        self, draw: NDArray[np.int64], step: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields views (M, S, K, C, H, W), labels (M, S), present (M, S), mask (M,).

        Where there are draws, uniform numbers (M, S, K, D) stand before the mask.
        `present` is False where a user has fewer than S examples, the mask where there
        is no user. An empty draw yields nothing.

        Args:
            draw: Drawn users, each once.
            step: Step number, from which selection and augmentation follow.
        """
        size = self._max_examples
        rng = self._streams.generator("selection", step)
        rows, chosen = self._users.select(draw, max_examples=size, rng=rng)
        padding = np.zeros((self._microbatch_size, size), np.bool_)
        chosen = chosen[self._share(len(draw))]
        present = upload(
            torch.from_numpy(np.concatenate([chosen, padding])), self._device
        )
        start = 0
        for views, labels, *uniforms, mask in self._load_examples(rows.ravel(), step):
            num_users = len(mask) // size
            yield (
                views.view(num_users, size, *views.shape[1:]),  # (M, S, K, C, H, W)
                labels.view(num_users, size),
                present[start : start + num_users],
                *(one.view(num_users, size, *one.shape[1:]) for one in uniforms),
                mask.view(num_users, size)[:, 0],
            )
            start += num_users
