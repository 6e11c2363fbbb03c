"""Views: the augmented copies of an example whose gradients are averaged.

The randomness of a step is drawn once for its whole draw of examples, so that views
depend neither on the microbatch size nor on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsgd import kernels
from dpsgd.data.dataset import upload
from dpsgd.errors import ConfigError, fault

__all__ = [
    "ViewParameters",
    "cut_views",
    "draw_views",
    "make_views",
    "normalize",
    "pixel_levels",
]

_CROPPED = {"crop", "crop_flip"}
_FLIPPED = {"flip", "crop_flip"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewParameters:
    """Where each view is cut from its padded image, and whether it is mirrored.

    Args:
        offsets: (R, K, 2) int64, row and column of the crop's corner in the padded
            image, each in [0, 2 * padding].
        flips: (R, K) bool, True where left and right are swapped.
        padding: Pixels mirrored around the image; 0 without cropping.
    """

    offsets: Tensor
    flips: Tensor
    padding: int

    def microbatch(self, start: int, size: int) -> "ViewParameters":
        """Returns the parameters of `size` examples from `start`, zeros past the end.

        Args:
            start: Position in the draw, >= 0.
            size: Examples M, >= 0.
        """
        offsets = self.offsets[start : start + size]
        flips = self.flips[start : start + size]
        missing = size - len(flips)
        if missing > 0:
            zeros = offsets.new_zeros(missing, *offsets.shape[1:])
            offsets = torch.cat([offsets, zeros])
            flips = torch.cat([flips, flips.new_zeros(missing, *flips.shape[1:])])
        return ViewParameters(offsets=offsets, flips=flips, padding=self.padding)

    def of(self, rows: Tensor) -> "ViewParameters":
        """Returns the parameters of some examples, by their rows here (R,)."""
        return ViewParameters(
            offsets=self.offsets[rows], flips=self.flips[rows], padding=self.padding
        )

    def to(self, device: torch.device | str) -> "ViewParameters":
        """Returns the parameters on `device`."""
        return ViewParameters(
            offsets=upload(self.offsets, device),
            flips=upload(self.flips, device),
            padding=self.padding,
        )


def draw_views(
    rng: np.random.Generator,
    num_examples: int,
    *,
    augmentation: str,
    crop_padding: int,
    augmentation_multiplicity: int,
) -> ViewParameters:
    """Draws the views of a step's examples, all at once.

    Each view is uniform over the crops and flips that the augmentation allows, and
    independent of the others. One integer is drawn a view, example after example, so
    that appending an example leaves the views of those before it as they were.

    Args:
        rng: The stream `augmentation` of this step.
        num_examples: R >= 0, the size of the draw.
        augmentation: `none`, `flip`, `crop` or `crop_flip`.
        crop_padding: Pixels mirrored around the image, >= 0; unused without a crop.
        augmentation_multiplicity: Views K of each example, >= 1.

    Returns:
        Parameters on the CPU; offsets and flips are 0 where the augmentation does
        not use them.

    Raises:
        ConfigError: The augmentation is unknown.

    Source: De et al. 2022 (arXiv:2204.13650), "augmentation multiplicity".
    """
    _check_name(augmentation)
    padding = crop_padding if augmentation in _CROPPED else 0
    num_offsets = 2 * padding + 1
    num_flips = 2 if augmentation in _FLIPPED else 1
    num_views = num_offsets * num_offsets * num_flips
    shape = (num_examples, augmentation_multiplicity)
    codes = torch.from_numpy(rng.integers(num_views, size=shape))
    columns = codes % num_offsets
    rows = codes // num_offsets % num_offsets
    flips = codes // (num_offsets * num_offsets)
    offsets = torch.stack([rows, columns], dim=-1)  # (R, K, 2)
    return ViewParameters(offsets=offsets, flips=flips.bool(), padding=padding)


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
        (M, K, C, H, W) of the type of `levels`.

    Raises:
        ConfigError: The padding exceeds the image's side.
    """
    _check_padding(parameters.padding, min(images.shape[2:]))
    return kernels.make_views(
        images,
        levels,
        offsets=parameters.offsets,
        flips=parameters.flips,
        padding=parameters.padding,
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
    if augmentation not in _CROPPED | _FLIPPED | {"none"}:
        message = fault(
            "data.augmentation",
            augmentation,
            "must be none, flip, crop or crop_flip",
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
