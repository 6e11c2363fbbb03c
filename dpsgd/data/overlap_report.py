"""What is said of the near-duplicates between two sets: numbers, pairs and pictures.

A report that was written is read again by those who act on it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dpsgd.data.overlap import Framing, Matches, reframed
from dpsgd.data.store.sources import ImageSource
from dpsgd.errors import ConfigError, DataError, fault

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Overlap", "OverlapReport", "PublicImage"]

_STEPS = 0.05
_COLUMNS = 10
_ENLARGED = 2
_COLOURS = 128
_REPORT = "OVERLAP.json"
_COMPARE = "compare the sets again with bin/dpsgd-data overlap"


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
        sheet = Image.fromarray(pixels.numpy())
        size = (sheet.width * _ENLARGED, sheet.height * _ENLARGED)
        few = sheet.quantize(_COLOURS)  # a fifth of the bytes
        return few.resize(size, Image.Resampling.NEAREST)

    def _pair(self, public: Tensor, private: Tensor, row: int) -> Tensor:
        """Returns (3, 32 + gap, 64 + gap) pixels of one pair on white."""
        framing = self.framings[int(self.matches.framings[row])]
        mine = reframed(public[row][None].float(), framing.public)
        match = private[int(self.matches.rows[row])][None].float()
        theirs = reframed(match, framing.private, mirrored=framing.mirrored)
        theirs = torch.nn.functional.interpolate(theirs, mine.shape[-2:])
        in_colour = [one.expand(-1, 3, -1, -1) for one in (mine, theirs)]  # or grey
        both = torch.cat(in_colour, dim=3)[0].round().to(torch.uint8)
        return torch.nn.functional.pad(both, (1, 1, 1, 1), value=255)


class PublicImage(NamedTuple):
    """One image of a public set: its row, counted over all files, and its place."""

    row: int
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapReport:
    """What a written report says of the public set that was compared.

    Attributes:
        path: The report.
        num_public: Images of the public set.
        public_sha256: Digest of their content.
        above: The public image of each near-duplicate, by the number of its pair.
        below: The same of pairs that the contact sheet shows below the threshold.
    """

    path: Path
    num_public: int
    public_sha256: str
    above: Mapping[int, PublicImage]
    below: Mapping[int, PublicImage]

    @classmethod
    def read(cls, path: Path) -> "OverlapReport":
        """Reads the `overlap.json` that the search left.

        Args:
            path: The report.

        Raises:
            DataError: It is missing, torn, or something else.
        """
        try:
            content = json.loads(path.read_bytes())
            return cls(
                path=path,
                num_public=int(content["public"]),
                public_sha256=str(content["public_sha256"]),
                above=_public_images(content["pairs"]),
                below=_public_images(content["below"]),
            )
        except OSError as error:
            rule = f"cannot be read ({error.strerror})"
            remedy = "name the overlap.json that bin/dpsgd-data overlap left"
            raise DataError(fault(_REPORT, path, rule, remedy)) from error
        except KeyError as error:
            rule = f"is an older report, or none: it lacks {error}"
            raise DataError(fault(_REPORT, path, rule, _COMPARE)) from error
        except (ValueError, TypeError) as error:
            rule = f"is not a whole report of an overlap ({error})"
            raise DataError(fault(_REPORT, path, rule, _COMPARE)) from error

    def check_compared(self, public: ImageSource) -> None:
        """Refuses a report of another set, or of rows that the set does not have.

        Args:
            public: The set, every image of which is read.

        Raises:
            DataError: The number, content or order of its images is another.
        """
        if len(public) != self.num_public:
            rule = (
                f"compared {self.num_public:,} images, and PUBLIC has {len(public):,}"
            )
            raise self._fault(rule, "name the set that was compared")
        if public.content_sha256() != self.public_sha256:
            rule = "compared other images than those of PUBLIC, or in another order"
            raise self._fault(rule, "name the set that was compared")
        for number, image in {**self.above, **self.below}.items():
            if not 0 <= image.row < self.num_public:
                rows = f"rows 0 to {self.num_public - 1}"
                rule = f"names row {image.row} in pair {number}, and PUBLIC has {rows}"
                raise self._fault(rule, _COMPARE)

    def chosen(
        self, *, keep: Collection[int], also: Collection[int]
    ) -> list[PublicImage]:
        """Returns the images to leave out, in the order of their rows.

        Args:
            keep: Numbers of pairs above the threshold that are no duplicates.
            also: Numbers of pairs below it that are.

        Raises:
            ConfigError: There is no such pair.
        """
        self._check_known("--keep", keep, self.above, "above")
        self._check_known("--also", also, self.below, "below")
        left = {image for number, image in self.above.items() if number not in keep}
        return sorted(left | {self.below[number] for number in also})

    def _check_known(
        self,
        option: str,
        numbers: Collection[int],
        pairs: Mapping[int, PublicImage],
        side: str,
    ) -> None:
        """Raises if a number is not of one of these pairs."""
        for number in numbers:
            if number not in pairs:
                rule = f"must be the number of a pair {side} the threshold"
                known = f"has {min(pairs)} to {max(pairs)}" if pairs else "has none"
                raise ConfigError(fault(option, number, rule, f"{self.path} {known}"))

    def _fault(self, rule: str, remedy: str) -> DataError:
        """Returns the error that names the report."""
        return DataError(fault(_REPORT, self.path, rule, remedy))


def _public_images(pairs: Any) -> dict[int, PublicImage]:
    """Returns the public image of each pair, by the pair's number."""
    images = {
        int(pair["pair"]): PublicImage(int(pair["public_row"]), str(pair["public"]))
        for pair in pairs
    }
    # Such a report is not what was written: images would be left in, or counted twice.
    if min(len(images), len({image.row for image in images.values()})) < len(pairs):
        raise ValueError("two pairs have one number or row")
    return images
