"""Views: the augmented copies of an example whose gradients are averaged.

The randomness of a step is drawn once for its whole draw of examples, so that views
depend neither on the microbatch size nor on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dpsgd import kernels
from dpsgd.config import AugmentationName
from dpsgd.data.dataset import upload
from dpsgd.data.fixed_views import FixedNumbers
from dpsgd.errors import ConfigError, fault

__all__ = [
    "ViewParameters",
    "canvas_side",
    "cut_views",
    "draw_views",
    "make_views",
    "normalize",
    "pixel_levels",
]

_CROPPED = {"crop", "crop_flip"}
_SCALED = {"scaled_crop_flip"}
_RESIZED = {"resized_crop_flip"}
_FLIPPED = {"flip", "crop_flip"} | _SCALED | _RESIZED
# An image is scaled to so many times the side of the views that are cut from it.
_SCALE = 1.2
# Ten attempts of two numbers at a random part of an image, and two for its corner.
_NUMBERS_OF_A_CROP = 22


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewParameters:
    """Where each view is cut from its padded image, and whether it is mirrored.

    Args:
        offsets: (R, K, 2) int64, row and column of the crop's corner in the padded
            image, each in [0, 2 * padding], or in [0, side of the image - side].
        flips: (R, K) bool, True where left and right are swapped.
        padding: Pixels mirrored around the image; 0 without cropping.
        side: Of the square views; None gives them the size of the image.
        crops: (R, K, 22) float64 in [0, 1), on the CPU, that say which part of an image
            a view shows, for who decodes it; None shows all of what was decoded.
        mixtures: (R, X, 3) as `draw_mixtures` returns them; None mixes no views.
    """

    offsets: Tensor
    flips: Tensor
    padding: int
    side: int | None = None
    crops: Tensor | None = None
    mixtures: Tensor | None = None

    def microbatch(self, start: int, size: int) -> "ViewParameters":
        """Returns the parameters of `size` examples from `start`, zeros past the end.

        Args:
            start: Position in the draw, >= 0.
            size: Examples M, >= 0.
        """

        def part(tensor: Tensor) -> Tensor:
            there = tensor[start : start + size]
            missing = size - len(there)
            if missing == 0:
                return there
            return torch.cat([there, there.new_zeros(missing, *there.shape[1:])])

        return self._each(part, with_crops=True)

    def to(self, device: torch.device | str) -> "ViewParameters":
        """Returns the parameters on `device`, but for the crops, which stay behind."""
        return self._each(lambda tensor: upload(tensor, device))

    def shared_by(self, num_canvases: int) -> "ViewParameters":
        """Returns the parameters of views that are cut from several images each.

        Args:
            num_canvases: Images J of every example, a divisor of K: views are dealt to
                them in order, and the result is of R J examples of K / J views, none
                of them mixed.
        """

        def dealt(tensor: Tensor) -> Tensor:
            num_examples, num_views = tensor.shape[:2]
            shape = (num_examples * num_canvases, num_views // num_canvases)
            return tensor.reshape(*shape, *tensor.shape[2:])

        return replace(self, mixtures=None)._each(dealt)

    def _each(
        self, change: Callable[[Tensor], Tensor], *, with_crops: bool = False
    ) -> "ViewParameters":
        """Returns the parameters with every tensor changed."""
        crops, mixtures = self.crops, self.mixtures
        return replace(
            self,
            offsets=change(self.offsets),
            flips=change(self.flips),
            crops=change(crops) if with_crops and crops is not None else crops,
            mixtures=None if mixtures is None else change(mixtures),
        )


def draw_views(
    rng: np.random.Generator | FixedNumbers,
    num_examples: int,
    *,
    augmentation: str,
    crop_padding: int,
    augmentation_multiplicity: int,
    image_size: int | None = None,
) -> ViewParameters:
    """Draws the views of a step's examples, all at once.

    Each view is uniform over the crops and flips that the augmentation allows, and
    independent of the others. Equally many numbers are drawn a view, example after
    example, so that appending one leaves the views of those before it as they were.

    Args:
        rng: The stream `augmentation` of this step, or what stands for it.
        num_examples: R >= 0, the size of the draw.
        augmentation: A value of `data.augmentation`.
        crop_padding: Pixels mirrored around the image, >= 0; unused without a crop.
        augmentation_multiplicity: Views K of each example, >= 1.
        image_size: Side of the views where images are decoded to another size.

    Returns:
        Parameters on the CPU; offsets and flips are 0 where the augmentation does
        not use them.

    Raises:
        ConfigError: The augmentation is unknown.

    Source: De et al. 2022 (arXiv:2204.13650), "augmentation multiplicity".
    """
    _check_name(augmentation)
    shape = (num_examples, augmentation_multiplicity)
    if augmentation in _RESIZED:
        return _draw_parts(rng, shape)
    padding = crop_padding if augmentation in _CROPPED else 0
    side = image_size if augmentation in _SCALED else None
    num_offsets = 2 * padding + 1
    if side is not None:
        num_offsets = canvas_side(augmentation, side) - side + 1
    num_flips = 2 if augmentation in _FLIPPED else 1
    num_views = num_offsets * num_offsets * num_flips
    codes = torch.from_numpy(rng.integers(num_views, size=shape))
    columns = codes % num_offsets
    rows = codes // num_offsets % num_offsets
    flips = codes // (num_offsets * num_offsets)
    offsets = torch.stack([rows, columns], dim=-1)  # (R, K, 2)
    return ViewParameters(
        offsets=offsets, flips=flips.bool(), padding=padding, side=side
    )


def _draw_parts(
    rng: np.random.Generator | FixedNumbers, shape: tuple[int, int]
) -> ViewParameters:
    """Draws views that each show a part of the image of their own."""
    numbers = torch.from_numpy(rng.random((*shape, 1 + _NUMBERS_OF_A_CROP)))
    return ViewParameters(
        offsets=torch.zeros((*shape, 2), dtype=torch.int64),
        flips=numbers[..., 0] < 0.5,
        padding=0,
        crops=numbers[..., 1:],
    )


def canvas_side(augmentation: str, image_size: int) -> int:
    """Returns the side that an image is scaled to, for views to be cut from it.

    Args:
        augmentation: A value of `data.augmentation`.
        image_size: Side of the views.

    Source: De et al. 2022 (arXiv:2204.13650), reference code: 268 for views of 224.

    >>> canvas_side("scaled_crop_flip", 224)
    268
    """
    return int(_SCALE * image_size) if augmentation in _SCALED else image_size


def make_views(
    images: Tensor,
    parameters: ViewParameters,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalises images and cuts their views.

    Each image is padded by mirroring, edge pixel included, then cropped to its own
    size, then flipped.

    Args:
        images: (M, C, H, W) uint8, on any device.
        parameters: Views of these M examples, on the same device.
        mean: As for `normalize`.
        std: As for `normalize`.
        dtype: Float type of the result.

    Returns:
        (M, K, C, H, W) of `dtype`; the values are those of `normalize` on the CPU, to
        the last bit, on every device.

    Raises:
        ConfigError: The padding exceeds the image's side, or `mean` or `std` does not
            fit the channels.

    Source: De et al. 2022 (arXiv:2204.13650), reference code: normalise, symmetric
    padding, random crop, random flip.
    """
    levels = pixel_levels(images.shape[1], mean=mean, std=std, dtype=dtype)
    return cut_views(images, levels.to(images.device), parameters)


def cut_views(images: Tensor, levels: Tensor, parameters: ViewParameters) -> Tensor:
    """Does what `make_views` does, with constants made once.

    Args:
        images: (M, C, H, W) uint8, on any device.
        levels: (C, 256), what `pixel_levels` returns, on the same device.
        parameters: Views of these M examples, on the same device.

    Returns:
        (M, K, C, h, w) of the type of `levels`, as large as the images unless the
        parameters have a side.

    Raises:
        ConfigError: The padding exceeds the image's side.
    """
    _check_padding(parameters.padding, min(images.shape[2:]))
    side = parameters.side
    return kernels.make_views(
        images,
        levels,
        offsets=parameters.offsets,
        flips=parameters.flips,
        padding=parameters.padding,
        size=None if side is None else (side, side),
    )


def pixel_levels(
    num_channels: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Returns what `normalize` makes of each of the 256 pixel values.

    Args:
        num_channels: Channels C of the images.
        mean: As for `normalize`.
        std: As for `normalize`.
        dtype: Float type of the result.

    Returns:
        (C, 256) of `dtype`, on the CPU.

    Raises:
        ConfigError: As `normalize`.
    """
    pixels = torch.arange(256, dtype=torch.uint8).expand(num_channels, 1, 256)
    return normalize(pixels, mean=mean, std=std, dtype=dtype)[:, 0]


def normalize(
    images: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns (pixel / 255 - mean) / std, with public constants.

    Args:
        images: (..., C, H, W) uint8 pixels.
        mean: One value a channel or one for all, in units of pixel / 255. Public:
            computed from private data it would need privacy budget.
        std: Likewise, > 0.
        dtype: Float type of the result; float32 or wider is used on the way.

    Returns:
        (..., C, H, W) of `dtype`.

    Raises:
        ConfigError: `mean` or `std` has neither one value nor one a channel.

    >>> pixels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    >>> normalize(pixels, mean=(0.5,), std=(0.5,))
    tensor([[[-1.,  1.]]])
    """
    wide = torch.promote_types(dtype, torch.float32)
    num_channels = images.shape[-3]
    center = _per_channel("data.mean", mean, num_channels).to(images.device, wide)
    scale = _per_channel("data.std", std, num_channels).to(images.device, wide)
    return ((images.to(wide) / 255 - center) / scale).to(dtype)


def _check_name(augmentation: str) -> None:
    """Refuses an augmentation that is not known."""
    known = get_args(AugmentationName)
    if augmentation not in known:
        message = fault(
            "data.augmentation",
            augmentation,
            f"must be one of {', '.join(known)}",
            "choose one of these",
        )
        raise ConfigError(message)


def _check_padding(padding: int, side: int) -> None:
    """Refuses more padding than there are pixels to mirror."""
    if padding > side:
        message = fault(
            "data.crop_padding",
            padding,
            f"must be at most the image's side, {side}",
            "lower it: no more pixels can be mirrored",
        )
        raise ConfigError(message)


def _per_channel(field: str, values: tuple[float, ...], num_channels: int) -> Tensor:
    """Returns (C or 1, 1, 1) float64 constants."""
    if len(values) not in (1, num_channels):
        message = fault(
            field,
            list(values),
            f"must have one value, or one for each of {num_channels} channels",
            "change its length",
        )
        raise ConfigError(message)
    return torch.tensor(values, dtype=torch.float64)[:, None, None]
