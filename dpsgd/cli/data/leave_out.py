"""`dpsgd-data leave-out`: a public set without what a private one holds, too."""

import argparse
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from dpsgd.cli.errors import Commands, UsageParser
from dpsgd.data import OverlapReport, PublicImage, leave_out, open_source
from dpsgd.data.store import ImageSource
from dpsgd.report import facts_table

__all__ = ["add_to"]

_MAX_TOLD = 20
_EPILOG = """\
FOLDER gets the files of PUBLIC under their names, parquet files or class folders of
copied images, and left_out.json, which says what was left out. It has the name
FOLDER.part until it is whole. Without anything to leave out, nothing is written.

Look at overlap.png first. Its pairs are numbered from 1, ten in a line.

What is left out depends on the private set: whoever sees which public images are
missing learns that it holds images like them, and no epsilon covers that.
"""


def add_to(commands: "Commands[UsageParser]") -> None:
    """Adds `leave-out`.

    Args:
        commands: What it is added to.
    """
    command = commands.add_parser(
        "leave-out",
        help="a public set without its near-duplicates of a private one",
        description="Writes a public set without the images that `overlap` found.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("public", metavar="PUBLIC", help="the set, as for `overlap`")
    command.add_argument(
        "report", type=Path, metavar="OVERLAP.json", help="what `overlap` left"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="is made"
    )
    for option, which in (
        ("--keep", "above the threshold that are no duplicates: keep their images"),
        ("--also", "below it that are duplicates: leave their images out, too"),
    ):
        command.add_argument(
            option,
            type=int,
            nargs="+",
            action="extend",
            default=[],
            metavar="PAIR",
            help=f"numbers of pairs {which}",
        )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Writes the set, and tells what is missing."""
    console = Console(markup=False, emoji=False, highlight=False)
    report = OverlapReport.read(arguments.report)
    images = report.chosen(keep=arguments.keep, also=arguments.also)
    source = open_source(arguments.public, field="PUBLIC")
    report.check_compared(source)
    if not images:
        told = "nothing to leave out, and nothing written"
        console.print(f"{told}: use {arguments.public} as it is", soft_wrap=True)
        return
    rows = [image.row for image in images]
    note = {
        "public": arguments.public,
        "public_sha256": report.public_sha256,
        "report": str(report.path),
        "report_sha256": hashlib.sha256(report.path.read_bytes()).hexdigest(),
        "keep": sorted(set(arguments.keep)),
        "also": sorted(set(arguments.also)),
        "num_examples": len(source) - len(rows),
        "left_out": [_described(source, image) for image in images],
    }
    leave_out(source, rows, arguments.out, note=note)
    _tell(console, note)
    console.print(f"written: {arguments.out}", soft_wrap=True)


def _described(source: ImageSource, image: PublicImage) -> dict[str, Any]:
    """Returns what the note says of one image."""
    label = int(source.labels[image.row])
    names = source.class_names
    return {
        "row": image.row,
        "public": image.place,
        "label": label,
        "class": names[label] if names else str(label),
    }


def _tell(console: Console, note: dict[str, Any]) -> None:
    """Prints how many images of which classes are missing, and what to declare."""
    left = note["left_out"]
    total = note["num_examples"] + len(left)
    counts = Counter((one["label"], one["class"]) for one in left).most_common()
    rows = [("images", f"{len(left):,} of {total:,}")]
    rows += [
        (f"  class {name}, label {label}", f"{count:,}")
        for (label, name), count in counts[:_MAX_TOLD]
    ]
    if len(counts) > _MAX_TOLD:
        rest = sum(count for _, count in counts[_MAX_TOLD:])
        rows.append((f"  {len(counts) - _MAX_TOLD} other classes", f"{rest:,}"))
    rows.append(("data.num_examples", str(note["num_examples"])))
    console.print(facts_table(rows, title="Left out"))
