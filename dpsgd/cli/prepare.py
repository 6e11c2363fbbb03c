"""`bin/dpsgd-prepare`: packs images into a store, from which runs take any of them."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.data import Resizing, Store, open_source, prepare
from dpsgd.errors import ConfigError, DataError, fault

__all__ = ["main"]

_MAX_TOLD = 20
_EPILOG = """\
SOURCE is a folder of class folders, as ImageNet and Places365 are unpacked, or parquet
files. Every image is decoded once, so that none fails a run later. A command that was
killed goes on where it was when it is given again. Users and groups of parquet files
are not kept: take data.source=parquet for them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0, or 2 when something given is at fault.
    """
    return exit_code(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = UsageParser(
        prog="dpsgd-prepare",
        description="Pack images into a store for data.source=store.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="images")
    parser.add_argument("store", metavar="STORE", nargs="?", type=Path, help="folder")
    parser.add_argument(
        "--verify", type=Path, metavar="STORE", help="only read a store, every byte"
    )
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out images that do not decode; the manifest lists them",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="N",
        help="make images smaller whose shorter side has more than N pixels",
    )
    parser.add_argument(
        "--quality", type=int, metavar="Q", help="of the JPEG files written then"
    )
    for kind in ("image", "label"):
        parser.add_argument(
            f"--{kind}-column",
            metavar="NAME",
            help=f"parquet column of {kind}s (default: found by its type)",
        )
    arguments = parser.parse_args(argv)
    if (arguments.verify is None) == (arguments.store is None):
        parser.error("SOURCE and STORE are required, or --verify STORE alone")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    """Packs, or verifies."""
    console = Console(markup=False, emoji=False, highlight=False)
    if arguments.verify is not None:
        return _verify(console, arguments.verify)
    resizing = Resizing(short_side=arguments.short_side, quality=arguments.quality)
    _require_apart(arguments.source, arguments.store)
    source = open_source(
        arguments.source,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    with _progress(console, "packing", len(source)) as show:
        held = prepare(
            source,
            arguments.store,
            resizing=resizing,
            skip_corrupt=arguments.skip_corrupt,
            on_progress=show,
        )
    _tell(console, Store(arguments.store, field="STORE"))
    if held < len(source):
        skipped = len(source) - held
        console.print(f"skipped: {skipped:,} images that do not decode")
    return 0


def _require_apart(source: str, store: Path) -> None:
    """Raises ConfigError if the store would be an image folder of its own source."""
    if Path(source).resolve() in store.resolve().parents:
        rule = "lies in SOURCE, which would have a folder without images then"
        raise ConfigError(fault("STORE", store, rule, "name a folder beside it"))


def _verify(console: Console, path: Path) -> int:
    """Reads every byte of a store."""
    store = Store(path, field="--verify")
    done = iter(range(1, len(store) + 1))
    with _progress(console, "verifying", len(store)) as show:
        damaged = store.verify(lambda: show(next(done)))
    if damaged:
        told = ", ".join(str(index) for index in damaged[:_MAX_TOLD])
        more = len(damaged) - _MAX_TOLD
        told += f" and {more} more" if more > 0 else ""
        rule = f"images with a wrong checksum: {told}"
        remedy = "copy the store again, or prepare it anew"
        raise DataError(fault("--verify", path, rule, remedy))
    _tell(console, store)
    return 0


def _tell(console: Console, store: Store) -> None:
    """Prints what a store holds."""
    size = sum(store.manifest.shards) / 2**20
    classes = len(store.manifest.class_names)
    text = f"{len(store):,} images, {classes} classes, {size:,.1f} MiB"
    console.print(f"{store.path}: {text}", soft_wrap=True)


@contextmanager
def _progress(
    console: Console, what: str, total: int
) -> Iterator[Callable[[int], None]]:
    """Shows a bar in a terminal; yields what it is told to."""
    bar = Progress(
        TextColumn(f"[bold]{what}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda done: bar.update(task, completed=done)
