"""`dpsgd-data overlap`: near-duplicates between a public and a private set."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from dpsgd.cli.errors import Commands, UsageParser
from dpsgd.data import (
    FRAMINGS,
    Framing,
    Matches,
    Overlap,
    find_matches,
    load_images,
    new_folder,
    open_source,
    told_of_writing,
)
from dpsgd.report import facts_table, to_json

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["add_to"]

_PAIRS_SHOWN = 100
_FACTS, _SHEET = "overlap.json", "overlap.png"
_OWNER_ONLY = 0o600
_EPILOG = """\
One set may squash whole photographs into squares where the other crops their centre, so
central crops of the images of one set are compared with those of the other, mirrored
too. The score is the correlation of fine detail. The threshold is the best score that
public images reach upside down, where no match is a duplicate. DIR gets overlap.json,
with every pair above it, and overlap.png, with the best pairs side by side: look at it.
It has the name DIR.part until they are whole.
Pairs are numbered from 1 as the sheet has them, ten in a line; overlap.json also has
those that it shows below the threshold. `leave-out` acts on what was found.
"""


def add_to(commands: "Commands[UsageParser]") -> None:
    """Adds `overlap`.

    Args:
        commands: What it is added to.
    """
    overlap = commands.add_parser(
        "overlap",
        help="near-duplicates between a public and a private set",
        description="Finds near-duplicates between a public and a private set.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = "parquet file, glob or folder, or folder of class folders"
    overlap.add_argument("public", metavar="PUBLIC", help=kinds)
    overlap.add_argument("private", metavar="PRIVATE", help="the same")
    overlap.add_argument(
        "--out",
        type=Path,
        default=Path("overlap"),
        metavar="DIR",
        help="default: %(default)s",
    )
    overlap.add_argument(
        "--crop",
        choices=["both", "public", "private"],
        default="both",
        help="whose images are cropped to match the other's (default: %(default)s)",
    )
    overlap.add_argument(
        "--control",
        type=int,
        metavar="N",
        help="public images that are searched upside down (default: all)",
    )
    overlap.add_argument(
        "--threshold", type=float, metavar="SCORE", help="default: from the control"
    )
    overlap.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Makes the folder of the report, then searches."""
    folder: Path = arguments.out
    console = Console(markup=False, emoji=False, highlight=False)
    with new_folder(folder, field="--out") as partial:
        facts, sheet = _compared(console, arguments)
        with told_of_writing(folder, field="--out"):
            (partial / _FACTS).touch(_OWNER_ONLY)
            (partial / _FACTS).write_text(to_json(facts, indent=1), encoding="utf-8")
            sheet.save(partial / _SHEET, optimize=True)
    _show(console, facts)
    console.print(f"pairs and pictures: {folder}", soft_wrap=True)


def _compared(
    console: Console, arguments: argparse.Namespace
) -> tuple[dict[str, Any], "PIL.Image.Image"]:
    """Returns what the report says, and the pairs side by side."""
    fingerprint = open_source(arguments.public, field="PUBLIC").content_sha256()
    public, public_places = load_images("PUBLIC", arguments.public)
    private, private_places = load_images("PRIVATE", arguments.private)
    overlap = _searched(console, arguments, public.images, private.images)
    num_found = len(overlap.found)
    most = max(num_found, _PAIRS_SHOWN)
    pairs = overlap.pairs(public_places, private_places, most=most)
    facts = {
        "public": len(public),
        "public_sha256": fingerprint,
        "private": len(private),
        "control": len(overlap.control.scores),
        "threshold": overlap.threshold,
        "above": _above(overlap),
        "pairs": pairs[:num_found],
        "below": pairs[num_found:],
    }
    sheet = overlap.contact_sheet(public.images, private.images, most=_PAIRS_SHOWN)
    return facts, sheet


def _searched(
    console: Console, arguments: argparse.Namespace, public: Tensor, private: Tensor
) -> Overlap:
    """Searches the public images as they are, and some of them upside down."""
    framings = _framings(arguments.crop)
    step = max(1, len(public) // (arguments.control or len(public)))

    def search(name: str, images: Tensor) -> Matches:
        console.print(f"{name}: {len(images):,} x {len(private):,} images")
        return find_matches(
            images,
            private,
            framings=framings,
            on_framing=lambda framing: console.print(f"  {framing}"),
        )

    matches = search("public", public)
    control = search("control", public[::step].flip(2))
    threshold = arguments.threshold
    if threshold is None:
        threshold = float(control.scores.max())
    return Overlap(
        matches=matches, control=control, framings=framings, threshold=threshold
    )


def _framings(crop: str) -> list[Framing]:
    """Returns the framings that crop the images of the sets that were named."""
    whole = (1.0, 1.0)
    return [
        framing
        for framing in FRAMINGS
        if (framing.public == whole or crop != "private")
        and (framing.private == whole or crop != "public")
    ]


def _above(overlap: Overlap) -> list[dict[str, float]]:
    """Returns how many pairs have a higher score than some, and how many by chance."""
    return [
        {"score": round(score, 2), "pairs": pairs, "by_chance": chance}
        for score, pairs, chance in overlap.table()
    ]


def _show(console: Console, facts: dict[str, Any]) -> None:
    """Prints the numbers."""
    rows = [
        (
            f"score above {row['score']:.2f}",
            f"{row['pairs']:,} pairs, {row['by_chance']:,.0f} by chance",
        )
        for row in facts["above"]
    ]
    found = f"{len(facts['pairs']):,} pairs above {facts['threshold']:.3f}"
    rows.append(("near-duplicates", found))
    console.print(facts_table(rows, title="Overlap"))
