"""`bin/dpsgd-report`: writes what run directories hold as a page to look at."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.errors import ConfigError, fault, readable
from dpsgd.report import (
    OwnFiles,
    RunDirectory,
    comparison_report,
    read_run,
    run_report,
)

__all__ = ["main"]


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
        prog="dpsgd-report",
        description="Write a self-contained report.html, and its figures as PNG.",
    )
    parser.add_argument(
        "run_dirs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="folder that bin/dpsgd-train made; several are compared",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: into the run's folder; of several runs "
        "runs/report-<time>)",
    )
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    """Reads the runs and writes the report."""
    if arguments.output is not None:
        _check_output(arguments.output, arguments.run_dirs)
    runs = [read_run(path) for path in arguments.run_dirs]
    report = run_report(runs[0]) if len(runs) == 1 else comparison_report(runs)
    folder = arguments.output or _default_folder(arguments.run_dirs, datetime.now())
    OwnFiles(folder, option="--output").replace(report.contents())
    console = Console(markup=False, emoji=False)  # a path may hold [brackets]
    text = f"report: {folder / 'report.html'}"
    console.print(text, highlight=False, soft_wrap=True)
    return 0


def _check_output(output: Path, run_dirs: Sequence[Path]) -> None:
    """Raises ConfigError if the report would replace that of a run it is not of."""
    with readable("--output", output):
        holds_run = RunDirectory(output).config.exists()
    if not holds_run:
        return
    if [path.resolve() for path in run_dirs] != [output.resolve()]:
        rule = "is the folder of a run, where only the report of that run alone belongs"
        raise ConfigError(fault("--output", output, rule, "name another folder"))


def _default_folder(run_dirs: Sequence[Path], now: datetime) -> Path:
    """Returns the folder of the only run, or a new one for several."""
    if len(run_dirs) == 1:
        return run_dirs[0]
    return Path("runs") / f"report-{now:%Y%m%d-%H%M%S}"
