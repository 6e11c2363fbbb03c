r"""Near-duplicates between two sets of small images, however each frames a photograph.

One set may squash a photograph into a square where another crops its centre, so each
image of one set is compared with several central crops of each of the other, and with
their mirror images.

1. Descriptor: the low frequencies of a 16x16 grey image, whitened, without the mean.
2. Search: for every public image and every framing the private image with the largest
   product of descriptors, exactly, by blocked matrix products.
3. Score: of the best few, the correlation of fine detail at full size, over shifts of
   up to two pixels: the mean over 16 patches of even contrast, lest one strong edge
   decide.
4. Threshold: the best score that public images reach upside down. They are as natural,
   and no duplicates, so that a higher score is hardly chance.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FRAMINGS", "Framing", "Matches", "find_matches", "reframed"]

_SIDE = 32
_COARSE = 16
_FREQUENCIES = 127
_SHIFT = 2
_PATCH = 7
_CANDIDATES = 4
_PUBLIC_BLOCK, _PRIVATE_BLOCK, _SCORE_BLOCK = 2048, 8192, 4096
_GREY = (0.299, 0.587, 0.114)
_LEAST_CONTRAST = 1e-4
_LEAST_LENGTH = 1e-3


@dataclass(frozen=True, slots=True)
class Framing:
    """How the images of both sets are cut to show the same part of a photograph.

    Attributes:
        public: Share of (height, width) in the middle of the public image.
        private: The same of the private image.
        mirrored: Whether the private image is mirrored.
    """

    public: tuple[float, float]
    private: tuple[float, float]
    mirrored: bool

    def __str__(self) -> str:
        def cut(share: tuple[float, float]) -> str:
            height, width = share
            return "whole" if share == (1, 1) else f"{height:.2f}x{width:.2f}"

        mirrored = ", mirrored" if self.mirrored else ""
        return f"{cut(self.public)} | {cut(self.private)}{mirrored}"


_WHOLE = (1.0, 1.0)
# Squares cut from photographs of 4:3 and 3:2, lying and standing.
_CUTS = ((1.0, 3 / 4), (1.0, 2 / 3), (3 / 4, 1.0), (2 / 3, 1.0))
FRAMINGS = tuple(
    Framing(public, private, mirrored)
    for public, private in (
        (_WHOLE, _WHOLE),
        *((_WHOLE, cut) for cut in _CUTS),
        *((cut, _WHOLE) for cut in _CUTS),
    )
    for mirrored in (False, True)
)
"""All framings that are compared."""


@dataclass(frozen=True, slots=True)
class Matches:
    """The best private counterpart of every public image.

    Attributes:
        scores: (P,) correlation of fine detail, in [-1, 1].
        rows: (P,) rows in the private set.
        framings: (P,) indices into the framings that were compared.
    """

    scores: Tensor
    rows: Tensor
    framings: Tensor


def find_matches(
    public: Tensor,
    private: Tensor,
    *,
    framings: Sequence[Framing] = FRAMINGS,
    on_framing: Callable[[Framing], None] = lambda framing: None,
) -> Matches:
    """Finds for every public image the private one that shares most detail with it.

    Args:
        public: (P, C, H, W) uint8, C of 1 or 3.
        private: (Q, C, H, W) uint8, of any size.
        framings: What is compared; the time is proportional to their number.
        on_framing: Told when each is done.
    """
    public, private = _grey(public), _grey(private)
    scale = _spectrum(private).square().mean(0).rsqrt()
    nearest = _Nearest(len(public))
    for index, framing in enumerate(framings):
        cut = reframed(public, framing.public)
        theirs = reframed(private, framing.private, mirrored=framing.mirrored)
        nearest.look(_described(cut, scale), _described(theirs, scale), framing=index)
        on_framing(framing)
    return _scored(public, private, nearest, framings)


def reframed(
    images: Tensor, share: tuple[float, float], *, mirrored: bool = False
) -> Tensor:
    """Cuts the middle of images and stretches it to their whole size.

    Args:
        images: (N, C, H, W) float.
        share: Shares of height and width that are kept, in (0, 1].
        mirrored: Swap left and right.
    """
    if share == _WHOLE:
        return images.flip(-1) if mirrored else images
    height, width = share
    theta = torch.tensor([[-width if mirrored else width, 0, 0], [0, height, 0]])
    grid = F.affine_grid(theta[None], [1, *images.shape[1:]], align_corners=False)
    parts = [
        F.grid_sample(part, grid.expand(len(part), -1, -1, -1), align_corners=False)
        for part in torch.split(images, _SCORE_BLOCK)
    ]
    return torch.cat(parts)


class _Nearest:
    """The best few private images of every public one, over all framings.

    Args:
        num_public: P.
    """

    def __init__(self, num_public: int) -> None:
        shape = (num_public, _CANDIDATES)
        self.products = torch.full(shape, -math.inf)
        self.rows = torch.zeros(shape, dtype=torch.int64)
        self.framings = torch.zeros(shape, dtype=torch.int64)

    def look(self, public: Tensor, private: Tensor, *, framing: int) -> None:
        """Compares all descriptors of two sets under one framing."""
        for start in range(0, len(public), _PUBLIC_BLOCK):
            block = slice(start, start + _PUBLIC_BLOCK)
            best, rows = _largest_products(public[block], private)
            self._keep(block, best, rows, framing)

    def _keep(self, block: slice, best: Tensor, rows: Tensor, framing: int) -> None:
        """Lets the new candidates of some public images replace worse ones."""
        products = torch.cat([self.products[block], best[:, None]], dim=1)
        rows = torch.cat([self.rows[block], rows[:, None]], dim=1)
        these = torch.full_like(rows[:, :1], framing)
        framings = torch.cat([self.framings[block], these], dim=1)
        kept, order = products.topk(_CANDIDATES, dim=1)
        self.products[block] = kept
        self.rows[block] = rows.gather(1, order)
        self.framings[block] = framings.gather(1, order)


def _largest_products(public: Tensor, private: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest product of each public descriptor, and with which row."""
    found = []
    for start in range(0, len(private), _PRIVATE_BLOCK):
        products = public @ private[start : start + _PRIVATE_BLOCK].T
        best, rows = products.max(dim=1)
        found.append((best, rows + start))
    values, rows = (torch.stack(parts) for parts in zip(*found, strict=True))
    best, which = values.max(dim=0)
    return best, rows.gather(0, which[None])[0]


def _scored(
    public: Tensor, private: Tensor, nearest: _Nearest, framings: Sequence[Framing]
) -> Matches:
    """Returns the candidate of each public image that shares most detail."""
    scores = torch.full(nearest.rows.shape, -math.inf)
    for index, framing in enumerate(framings):
        places = (nearest.framings == index).nonzero()  # (S, 2)
        for part in torch.split(places, _SCORE_BLOCK):
            mine = reframed(public[part[:, 0]], framing.public)
            rows = nearest.rows[part[:, 0], part[:, 1]]
            theirs = reframed(private[rows], framing.private, mirrored=framing.mirrored)
            scores[part[:, 0], part[:, 1]] = _detail_correlation(mine, theirs)
    best, which = scores.max(dim=1)
    return Matches(
        scores=best,
        rows=nearest.rows.gather(1, which[:, None])[:, 0],
        framings=nearest.framings.gather(1, which[:, None])[:, 0],
    )


def _detail_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Returns the (S,) largest mean correlation of patches, over shifts of pixels."""
    one, other = _detail(one), _detail(other)
    side = _SIDE - 2 * _SHIFT
    middle = _patches(one[:, _SHIFT : _SHIFT + side, _SHIFT : _SHIFT + side])
    best = torch.full((len(one),), -math.inf)
    for top, left in itertools.product(range(2 * _SHIFT + 1), repeat=2):
        moved = _patches(other[:, top : top + side, left : left + side])
        best = torch.maximum(best, (middle * moved).sum(2).mean(1))
    return best


def _patches(images: Tensor) -> Tensor:
    """Returns (S, patches, P) pixels, each patch of mean 0 and length 1."""
    patches = images.unfold(1, _PATCH, _PATCH).unfold(2, _PATCH, _PATCH)
    pixels = patches.flatten(3).flatten(1, 2)
    pixels = pixels - pixels.mean(2, keepdim=True)
    return F.normalize(pixels, dim=2, eps=_LEAST_LENGTH)


def _detail(images: Tensor) -> Tensor:
    """Returns (S, H, W) images less their surroundings, of even contrast."""
    detail = images - _surroundings(images, 5)
    contrast = _surroundings(detail.square(), 7).sqrt()
    floor = contrast.mean((2, 3), keepdim=True) / 2 + _LEAST_CONTRAST
    return (detail / (contrast + floor))[:, 0]


def _surroundings(images: Tensor, size: int) -> Tensor:
    """Returns the mean around every pixel."""
    return F.avg_pool2d(
        images, size, stride=1, padding=size // 2, count_include_pad=False
    )


def _grey(images: Tensor) -> Tensor:
    """Returns (N, 1, 32, 32) float grey images in [0, 1]."""
    weights = torch.tensor(_GREY if images.shape[1] == 3 else (1.0,)).view(-1, 1, 1)
    parts = []
    for part in torch.split(images, _SCORE_BLOCK):
        grey = (part / 255 * weights).sum(1, keepdim=True)
        size = (_SIDE, _SIDE)
        parts.append(F.interpolate(grey, size, mode="bilinear", antialias=True))
    return torch.cat(parts)


def _described(images: Tensor, scale: Tensor) -> Tensor:
    """Returns (N, D) whitened descriptors of length 1."""
    return F.normalize(_spectrum(images) * scale, dim=1)


def _spectrum(images: Tensor) -> Tensor:
    """Returns the (N, D) lowest frequencies of grey images, without their mean."""
    index = torch.arange(_COARSE)
    cosines = torch.cos(math.pi / _COARSE * (index[None] + 0.5) * index[:, None])
    small = F.adaptive_avg_pool2d(images, _COARSE)[:, 0]
    spectrum = cosines @ small @ cosines.T  # (N, 16, 16)
    order = (index[:, None] ** 2 + index**2).flatten().argsort(stable=True)
    return spectrum.flatten(1)[:, order[1 : 1 + _FREQUENCIES]]
