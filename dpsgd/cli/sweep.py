"""`bin/dpsgd-sweep`: many runs over chosen settings, and what came out of them."""

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpsgd.cli.errors import UsageParser, exit_code
from dpsgd.cli.signals import SIGNAL_EXIT, StopSignal
from dpsgd.errors import ConfigError, fault
from dpsgd.report import OwnFiles
from dpsgd.sweep.folder import SweepFolder
from dpsgd.sweep.page import sweep_report
from dpsgd.sweep.plan import ENTRY, SEED, SweepPlan, SweepRun, read_sweep, short_names
from dpsgd.sweep.processes import Slot, run_all, slots_of, train_command
from dpsgd.sweep.results import NOTE, SweepResults, collect
from dpsgd.sweep.slurm import slurm_script
from dpsgd.sweep.view import SweepView, runs_table

__all__ = ["main"]

_SOME_FAILED = 1
_SOME_LEFT = 1
_LONGEST_HEADING = 13
_FRAME = 3  # letters around a column of a table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        0, 1 when a run failed or is not finished though nothing stopped the sweep, 2
        when something given is at fault, 130 or 143 when stopped by SIGINT or SIGTERM,
        with a checkpoint of every run.
    """
    return exit_code(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = UsageParser(
        prog="dpsgd-sweep",
        description="Train with many settings: one process a GPU, or `jobs` on a CPU. "
        "Called again it goes on with what is unfinished and skips what is finished.",
        epilog=NOTE,
    )
    parser.add_argument(
        "sweep", type=Path, help="YAML file: base config and what varies"
    )
    parser.add_argument(
        "--sweep-dir", type=Path, metavar="DIR", help="default: runs/<name of the file>"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes on a CPU")
    parser.add_argument(
        "--retry-failed", action="store_true", help="try runs again that failed"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--plan", action="store_true", help="show the runs, and start none"
    )
    what.add_argument(
        "--only", type=int, metavar="INDEX", help="make one run, write no tables"
    )
    what.add_argument(
        "--summary", action="store_true", help="write tables of what is there by now"
    )
    what.add_argument(
        "--slurm", action="store_true", help="print a script for sbatch: a task a run"
    )
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    """Does what the arguments ask for."""
    plan = read_sweep(arguments.sweep)
    path = arguments.sweep_dir or Path("runs") / arguments.sweep.stem
    folder = SweepFolder(path)
    console = Console(markup=False, emoji=False)  # labels may hold [brackets]
    if arguments.plan:
        _show_plan(console, folder, plan)
        return 0
    if arguments.summary:
        folder.require(plan)
    folder.create(plan)
    if arguments.slurm:
        command = [str(Path(sys.argv[0]).resolve())]
        cwd = Path.cwd()
        script = slurm_script(plan, folder, command=command, working_directory=cwd)
        print(script, end="")
        return 0
    if arguments.summary:
        return _summarise(console, folder, plan)
    with folder.locked(is_shared=arguments.only is not None):
        if arguments.only is not None:
            return _run_one(console, folder, plan, arguments)
        return _run_all(console, folder, plan, arguments)


def _run_all(
    console: Console,
    folder: SweepFolder,
    plan: SweepPlan,
    arguments: argparse.Namespace,
) -> int:
    """Makes all runs that are left, then the tables."""
    jobs = plan.jobs if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise ConfigError(fault("--jobs", jobs, "must be above 0", "give 1 or more"))
    gpus = _num_gpus()
    slots = slots_of(plan, jobs=jobs, num_gpus=gpus, environment=os.environ)
    console.print(f"{len(plan.runs)} runs in {folder.path}, {_places(slots)}")
    console.print(f"note: {NOTE}")
    runs = _left(folder, plan.runs, retries_failed=arguments.retry_failed)
    stopped_by = _work(console, folder, plan, runs, slots)
    code = _summarise(console, folder, plan)
    if stopped_by is not None:
        console.print("stopped; the same command goes on")
        return SIGNAL_EXIT + stopped_by
    states = [folder.state(run).status for run in plan.runs]
    left = sum(status not in ("finished", "failed") for status in states)
    if left:
        told = "1 run is" if left == 1 else f"{left} runs are"
        console.print(f"{told} not finished; the same command goes on")
        return _SOME_LEFT
    return code


def _run_one(
    console: Console,
    folder: SweepFolder,
    plan: SweepPlan,
    arguments: argparse.Namespace,
) -> int:
    """Makes the run of one index, with all that this process may use."""
    index = arguments.only
    if not 0 <= index < len(plan.runs):
        rule = f"the sweep has the runs 0 to {len(plan.runs) - 1}"
        raise ConfigError(fault("--only", index, rule, "name one of them"))
    run = plan.runs[index]
    runs = _left(folder, [run], retries_failed=arguments.retry_failed)
    stopped_by = _work(console, folder, plan, runs, [Slot("this machine", {})])
    if stopped_by is not None:
        return SIGNAL_EXIT + stopped_by
    state = folder.state(run)
    console.print(f"run {index} ({run.label}): {state.status}")
    if state.error:
        console.print(state.error)
    return 0 if state.status == "finished" else _SOME_FAILED


def _left(
    folder: SweepFolder, runs: Sequence[SweepRun], *, retries_failed: bool
) -> list[SweepRun]:
    """Returns the runs to start or go on with."""
    left = []
    for run in runs:
        status = folder.state(run).status
        if status == "failed" and retries_failed:
            folder.forget_failure(run)
            status = folder.state(run).status
        if status in ("waiting", "unfinished"):
            left.append(run)
    return left


def _work(
    console: Console,
    folder: SweepFolder,
    plan: SweepPlan,
    runs: Sequence[SweepRun],
    slots: Sequence[Slot],
) -> int | None:
    """Runs processes, and returns the signal that stopped them, if one did."""

    def command(run: SweepRun) -> list[str]:
        if folder.state(run).status == "waiting":
            folder.move_aside(run)
        return train_command(folder, plan, run)

    stop = StopSignal()
    view = SweepView(console, folder, plan)
    with stop, view:
        run_all(
            folder,
            runs,
            slots,
            command=command,
            on_look=view.look,
            stop_requested=lambda: stop.received is not None,
        )
    return stop.received


def _summarise(console: Console, folder: SweepFolder, plan: SweepPlan) -> int:
    """Writes tables and figures of what is there, and says what failed."""
    results = collect(folder, plan)
    contents = {**results.contents(), **sweep_report(results).contents()}
    OwnFiles(folder.path, option="--sweep-dir").replace(contents)
    if results.others:
        text = f"note: {len(results.others)} runs of other settings are left out"
        console.print(text)
    _show_results(console, results)
    for label, error in results.failures():
        text = f"failed: {label}: {error}"
        console.print(text, highlight=False, soft_wrap=True)
    if results.failures():
        console.print("the same command with --retry-failed tries them again")
    text = f"tables and report: {folder.path / 'report.html'}"
    console.print(text, highlight=False, soft_wrap=True)
    return _SOME_FAILED if results.failures() else 0


def _show_results(console: Console, results: SweepResults) -> None:
    """Prints the mean over seeds of each setting."""
    headings, rows = results.summary_table()
    if not rows:
        console.print("no run has finished yet")
        return
    names = short_names(results.told_columns(SEED))
    shown = [_broken(name) for name in (*names, *headings[len(names) :])]
    cells = [[*column] for column in zip(shown, *rows, strict=True)]
    has_room = sum(map(_width, cells)) < console.width
    table = Table(title="Test accuracy over seeds", title_justify="left")
    for heading in shown:
        is_whole = has_room and heading != ENTRY
        table.add_column(heading, justify="right", overflow="fold", no_wrap=is_whole)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(results.joint_in_words())


def _broken(name: str) -> str:
    r"""Returns a heading that is broken between words, where it is long.

    >>> _broken("expected_batch_size"), _broken("num_steps")
    ('expected_\nbatch_size', 'num_steps')
    """
    lines = textwrap.wrap(name.replace("_", "_ "), _LONGEST_HEADING)
    return "\n".join(lines).replace("_ ", "_")


def _width(cells: Sequence[str]) -> int:
    """Returns what a column takes at least; names of entries may be broken."""
    heading, *_ = cells
    pieces = [
        piece
        for cell in cells
        for piece in (cell.split() if heading == ENTRY else cell.splitlines())
    ]
    return max(map(len, pieces)) + _FRAME


def _show_plan(console: Console, folder: SweepFolder, plan: SweepPlan) -> None:
    """Prints the runs and how far each is."""
    rows = [(run, folder.state(run), ("", "", "", "")) for run in plan.runs]
    console.print(runs_table(rows, title=f"{plan.path.stem}", room=len(rows)))
    console.print(f"note: {NOTE}")


def _places(slots: Sequence[Slot]) -> str:
    """Returns where processes run, in words."""
    names: Mapping[str, None] = dict.fromkeys(slot.name for slot in slots)
    at_once = f"{len(slots)} at once" if len(slots) > 1 else "one at a time"
    return f"{at_once} on {', '.join(names)}"


def _num_gpus() -> int:
    """Returns how many GPUs this process may use."""
    import torch  # here, so that --plan and --help answer at once

    return torch.cuda.device_count()
