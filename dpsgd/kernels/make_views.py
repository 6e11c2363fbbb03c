"""Cuts the views of images in one launch, in the layout that convolutions read.

Normalising maps each of the 256 pixel values to a constant, so it is a table here: the
views have the values that the table was made with, to the last bit, on every device.
"""

import torch
from torch import Tensor

from dpsgd.kernels.dispatch import runs_on_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU and macOS comes without triton
    triton = None

__all__ = ["make_views", "make_views_reference", "make_views_triton"]

_PIXELS = 1024


def make_views(
    images: Tensor,
    levels: Tensor,
    *,
    offsets: Tensor,
    flips: Tensor,
    padding: int,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Replaces pixels by their levels, pads, crops and flips.

    Images are padded by mirroring, edge pixel included, then cropped, then flipped. The
    padded image is never made.

    Args:
        images: (M, C, H, W) uint8, contiguous.
        levels: (C, 256) float value of each pixel value in each channel, contiguous.
        offsets: (M, K, 2) int64, row and column of the crop's corner in the padded
            image, at most as many as the crop then has room for.
        flips: (M, K) bool, True where left and right are swapped.
        padding: Pixels mirrored around the image, at most its side.
        size: Height h and width w of the crops; None keeps those of the images.

    Returns:
        (M, K, C, h, w) of the type of `levels`. The kernel lays them out as
        (M, K, h, w, C): the M * K images are channels-last, and convolutions read them
        without a copy. The reference is contiguous.
    """
    run = make_views_triton if runs_on_triton(images) else make_views_reference
    return run(images, levels, offsets=offsets, flips=flips, padding=padding, size=size)


def make_views_reference(
    images: Tensor,
    levels: Tensor,
    *,
    offsets: Tensor,
    flips: Tensor,
    padding: int,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Does what `make_views` does, in PyTorch: one gather by index arithmetic."""
    num_examples, num_channels, *shape = images.shape
    height, width = size or shape
    device = images.device
    channel = torch.arange(num_channels, device=device)[:, None, None]
    pixels = levels[channel, images.long()]  # (M, C, H, W)
    top = offsets[:, :, 0, None] - padding
    left = offsets[:, :, 1, None] - padding
    across = torch.arange(width, device=device)
    across = torch.where(flips[:, :, None], width - 1 - across, across)
    rows = _mirror(top + torch.arange(height, device=device), shape[0])
    columns = _mirror(left + across, shape[1])  # (M, K, w)
    example = torch.arange(num_examples, device=device)
    return pixels[
        example[:, None, None, None, None],
        channel,
        rows[:, :, None, :, None],
        columns[:, :, None, None, :],
    ]  # (M, K, C, h, w)


def _mirror(index: Tensor, size: int) -> Tensor:
    """Folds indices up to `size` outside [0, size) back, edge repeated."""
    index = torch.where(index < 0, -1 - index, index)
    return torch.where(index >= size, 2 * size - 1 - index, index)


def make_views_triton(
    images: Tensor,
    levels: Tensor,
    *,
    offsets: Tensor,
    flips: Tensor,
    padding: int,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Does what `make_views` does, in one Triton launch."""
    num_channels, *shape = images.shape[1:]
    height, width = size or shape
    num_examples, num_views = flips.shape
    views = torch.empty(
        (num_examples, num_views, height, width, num_channels),
        dtype=levels.dtype,
        device=images.device,
    )
    if views.numel() > 0:
        num_programs = triton.cdiv(num_channels * height * width, _PIXELS)
        _make_views_kernel[(num_examples * num_views, num_programs)](
            images.contiguous(),
            levels.contiguous(),
            offsets.contiguous(),
            flips.contiguous(),
            views,
            num_views,
            padding,
            C=num_channels,
            H=shape[0],
            W=shape[1],
            CROP_H=height,
            CROP_W=width,
            BLOCK=_PIXELS,
        )
    return views.permute(0, 1, 4, 2, 3)  # (M, K, C, h, w)


if triton is not None:

    @triton.jit
    def _make_views_kernel(
        images,
        levels,
        offsets,
        flips,
        views,
        num_views,
        padding,
        C: tl.constexpr,
        H: tl.constexpr,
        W: tl.constexpr,
        CROP_H: tl.constexpr,
        CROP_W: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program: BLOCK pixels of one view, channels first to vary."""
        view = tl.program_id(0).to(tl.int64)
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = element < CROP_H * CROP_W * C
        channel = element % C
        column = element // C % CROP_W
        column = tl.where(tl.load(flips + view), CROP_W - 1 - column, column)
        top = tl.load(offsets + 2 * view).to(tl.int32) - padding
        left = tl.load(offsets + 2 * view + 1).to(tl.int32) - padding
        row = _mirrored(element // (C * CROP_W) + top, H)
        column = _mirrored(column + left, W)
        image = images + view // num_views * (C * H * W)
        place = (channel * H + row) * W + column
        pixel = tl.load(image + place, mask=inside, other=0).to(tl.int32)
        level = tl.load(levels + channel * 256 + pixel, mask=inside, other=0.0)
        tl.store(views + view * (CROP_H * CROP_W * C) + element, level, mask=inside)

    @triton.jit
    def _mirrored(index, size):
        """Folds indices up to `size` outside [0, size) back, edge repeated."""
        index = tl.where(index < 0, -1 - index, index)
        return tl.where(index >= size, 2 * size - 1 - index, index)
