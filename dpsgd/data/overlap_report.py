"""What is said of the near-duplicates between two sets: numbers, pairs and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpsgd.data.overlap import Framing, Matches, reframed

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Overlap"]

_STEPS = 0.05
_COLUMNS = 10
_ENLARGED = 2
_COLOURS = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Overlap:
    """A search and its control, which holds no duplicates.

    Attributes:
        matches: Of every public image.
        control: Of public images upside down.
        framings: What was compared.
        threshold: Score above which a pair is called a near-duplicate.
    """

    matches: Matches
    control: Matches
    framings: Sequence[Framing]
    threshold: float

    @property
    def ranked(self) -> Tensor:
        """Rows of all public images, the surest near-duplicate first."""
        return self.matches.scores.argsort(descending=True, stable=True)

    @property
    def found(self) -> Tensor:
        """Rows of the public images with a near-duplicate, the surest first."""
        return self.ranked[self.matches.scores[self.ranked] > self.threshold]

    def table(self) -> list[tuple[float, int, float]]:
        """Returns (score, pairs above it, those that chance explains) rows.

        Chance is what the control has above the score, scaled to the same number.
        """
        scale = len(self.matches.scores) / len(self.control.scores)
        top = max(float(self.matches.scores.max()), float(self.control.scores.max()))
        scores = [_STEPS * step for step in range(1, 20) if _STEPS * step <= top]
        return [
            (
                score,
                int((self.matches.scores > score).sum()),
                scale * float((self.control.scores > score).sum()),
            )
            for score in scores[-10:]
        ]

    def pairs(
        self, public_places: Sequence[str], private_places: Sequence[str], *, most: int
    ) -> list[dict[str, Any]]:
        """Returns the best pairs as plain values, with their numbers from 1.

        The near-duplicates come first, and the contact sheet has the same order.

        Args:
            public_places: Where each public image is.
            private_places: Where each private image is.
            most: Pairs returned; some below the threshold come last.
        """
        matches = self.matches
        return [
            {
                "pair": number,
                "public_row": row,
                "public": public_places[row],
                "private": private_places[int(matches.rows[row])],
                "score": round(float(matches.scores[row]), 4),
                "framing": str(self.framings[int(matches.framings[row])]),
            }
            for number, row in enumerate(self.ranked[:most].tolist(), start=1)
        ]

    def contact_sheet(
        self, public: Tensor, private: Tensor, *, most: int
    ) -> "PIL.Image.Image":
        """Returns the best pairs side by side, framed alike, in the order of scores.

        Args:
            public: (P, C, H, W) uint8.
            private: (Q, C, H, W) uint8.
            most: Pairs shown; some below the threshold come last.
        """
        from PIL import Image

        rows = self.ranked[:most].tolist()
        pairs = [self._pair(public, private, row) for row in rows]
        blank = torch.full_like(pairs[0], 255)
        pairs += [blank] * (-len(pairs) % _COLUMNS)
        lines = [
            torch.cat(pairs[start : start + _COLUMNS], dim=2)
            for start in range(0, len(pairs), _COLUMNS)
        ]
        pixels = torch.cat(lines, dim=1).permute(1, 2, 0)  # (H, W, C)
        sheet = Image.fromarray(pixels.expand(-1, -1, 3).numpy())
        size = (sheet.width * _ENLARGED, sheet.height * _ENLARGED)
        few = sheet.quantize(_COLOURS)  # a fifth of the bytes
        return few.resize(size, Image.Resampling.NEAREST)

    def _pair(self, public: Tensor, private: Tensor, row: int) -> Tensor:
        """Returns (C, 32 + gap, 64 + gap) pixels of one pair on white."""
        framing = self.framings[int(self.matches.framings[row])]
        mine = reframed(public[row][None].float(), framing.public)
        match = private[int(self.matches.rows[row])][None].float()
        theirs = reframed(match, framing.private, mirrored=framing.mirrored)
        theirs = torch.nn.functional.interpolate(theirs, mine.shape[-2:])
        both = torch.cat([mine, theirs], dim=3)[0].round().to(torch.uint8)
        return torch.nn.functional.pad(both, (1, 1, 1, 1), value=255)
