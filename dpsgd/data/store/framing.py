"""What of a decoded image a network is shown: canvases, from which views are cut."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

__all__ = ["CentralSquare", "Framing", "RandomParts", "random_part"]

_ATTEMPTS = 10
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]


class Framing(Protocol):
    """Makes canvases of an image, always the same of the same numbers."""

    @property
    def num_canvases(self) -> int:
        """Canvases J of one image."""
        ...

    @property
    def side(self) -> int:
        """Side of each in pixels."""
        ...

    def boxes(
        self, width: int, height: int, numbers: NDArray[np.float64] | None
    ) -> list[Box]:
        """Returns the part of an image that each canvas shows, scaled to its side.

        Args:
            width: Of the image.
            height: Of the image.
            numbers: (K, 22) of `ViewParameters.crops` for this image, or None.

        Returns:
            J boxes: left, top, right and bottom.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CentralSquare:
    """The largest square in the middle of an image, scaled.

    Args:
        side: Of the canvas.

    Source: De et al. 2022 (arXiv:2204.13650), reference code: central square, then
    bicubic scaling, for training (before a random crop) and evaluation alike.
    """

    side: int

    @property
    def num_canvases(self) -> int:
        """One, for all views."""
        return 1

    def boxes(
        self, width: int, height: int, numbers: NDArray[np.float64] | None
    ) -> list[Box]:
        """Returns the square; `numbers` play no part."""
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        return [(left, top, left + short, top + short)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomParts:
    """A random part of the image for each view, scaled to a square.

    Args:
        side: Of the canvases.
        num_canvases: Views K of one image.

    Source: Szegedy et al. 2015, "Going deeper with convolutions" (arXiv:1409.4842),
    section 6: 8 to 100 % of the area, aspect ratio in [3/4, 4/3].
    """

    side: int
    num_canvases: int

    def boxes(
        self, width: int, height: int, numbers: NDArray[np.float64] | None
    ) -> list[Box]:
        """Returns a random part for each view."""
        assert numbers is not None
        return [random_part(width, height, row) for row in numbers]


def random_part(width: int, height: int, numbers: NDArray[np.float64]) -> Box:
    """Returns a part of an image whose area and aspect ratio are random.

    The area is uniform, the aspect ratio uniform in its logarithm. The first of ten
    attempts that fits into the image is taken; failing that, the largest central part
    whose aspect ratio is allowed.

    Args:
        width: Of the image.
        height: Of the image.
        numbers: (22,) in [0, 1): area and aspect ratio of each attempt, then where the
            part lies across and down.
    """
    low, high = (math.log(bound) for bound in _ASPECT)
    for attempt in range(_ATTEMPTS):
        share, tilt = numbers[2 * attempt : 2 * attempt + 2].tolist()
        area = width * height * (_AREA[0] + share * (_AREA[1] - _AREA[0]))
        aspect = math.exp(low + tilt * (high - low))
        part = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part[0] <= width and 0 < part[1] <= height:
            across, down = numbers[2 * _ATTEMPTS :].tolist()
            left = int(across * (width - part[0] + 1))
            top = int(down * (height - part[1] + 1))
            return left, top, left + part[0], top + part[1]
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    part = (
        min(width, max(1, round(height * aspect))),
        min(height, max(1, round(width / aspect))),
    )
    left, top = (width - part[0]) // 2, (height - part[1]) // 2
    return left, top, left + part[0], top + part[1]
