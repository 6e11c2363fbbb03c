"""The progress of a sweep: a live table in a terminal, a line a change elsewhere."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpsgd.privacy import rounded_up
from dpsgd.report import read_run
from dpsgd.report.live import LiveView
from dpsgd.report.words import duration, percent
from dpsgd.sweep.folder import RunState, Status, SweepFolder
from dpsgd.sweep.plan import SweepPlan, SweepRun

__all__ = ["SweepView", "runs_table"]

_STYLES: Final[dict[Status, str]] = {
    "running": "bold cyan",
    "finished": "green",
    "failed": "bold red",
    "unfinished": "yellow",
    "waiting": "dim",
}
# What is shown first where there is no room for all.
_ORDER: Final[tuple[Status, ...]] = (
    "running",
    "failed",
    "unfinished",
    "finished",
    "waiting",
)
_SECONDS_BETWEEN_READS = 1.0
_LINES_AROUND = 9  # of the table's frame and what stands below it


class SweepView(LiveView[Live]):
    """Shows which runs are at work, how far they are and what came out.

    Args:
        console: A terminal gets a live table, anything else a line for each change.
        folder: Where the runs lie.
        plan: The runs.
    """

    def __init__(self, console: Console, folder: SweepFolder, plan: SweepPlan) -> None:
        super().__init__(console, partial(Live, console=console, auto_refresh=False))
        self._folder = folder
        self._plan = plan
        self._states = {run.index: folder.state(run) for run in plan.runs}
        self._progress = {run.index: self._read(run) for run in plan.runs}
        self._since: dict[int, float] = {}
        self._slots: Mapping[int, str] = {}
        self._last_read = 0.0

    def __exit__(self, *details: object) -> None:
        if self.live:
            self._show()
        super().__exit__(*details)

    def look(self, working: Mapping[int, str]) -> None:
        """Shows what has changed.

        Args:
            working: Slots of the runs that have a process, by index.
        """
        for run in self._plan.runs:
            was, is_working = run.index in self._slots, run.index in working
            if is_working and not was:
                self._since[run.index] = time.monotonic()
                self._states[run.index] = RunState("running")
                self._say(run, f"started on {working[run.index]}")
            elif was and not is_working:
                self._states[run.index] = self._folder.state(run)
                self._progress[run.index] = self._read(run)
                self._say(run, self._outcome(run))
        self._slots = dict(working)
        now = time.monotonic()
        if self.live and now - self._last_read >= _SECONDS_BETWEEN_READS:
            self._last_read = now
            for run in self._plan.runs:
                if run.index in working:
                    self._progress[run.index] = self._read(run)
            self._show()

    def _read(self, run: SweepRun) -> tuple[str, str, str]:
        """Returns step, epsilon and accuracy in words, as a run last wrote them."""
        directory = self._folder.directory(run)
        if not directory.config.is_file() or not directory.metrics.is_file():
            return "", "", ""
        record = read_run(directory.path)
        step = f"{record.step:,}/{run.config.train.num_steps:,}"
        epsilon = "" if record.epsilon is None else rounded_up(record.epsilon, 3)
        accuracy = record.main_accuracy
        return step, epsilon, "" if accuracy is None else percent(accuracy, 2)

    def _outcome(self, run: SweepRun) -> str:
        """Returns how a run ended, in words."""
        state = self._states[run.index]
        if state.status == "failed":
            return f"failed: {state.error}"
        if state.status == "finished":
            return f"finished: {self._progress[run.index][2]}"
        return "stopped"

    def _say(self, run: SweepRun, text: str) -> None:
        """Prints a line where there is no live table."""
        if not self.live:
            self.print_line(f"run {run.index} ({run.label}) {text}")

    def _show(self) -> None:
        """Draws the table anew."""
        assert self.live is not None  # the callers looked
        room = max(3, self.console.height - _LINES_AROUND)
        rows = [
            (run, self._states[run.index], self._row(run)) for run in self._plan.runs
        ]
        counts = Counter(state.status for state in self._states.values())
        summary = ", ".join(
            f"{counts[status]} {status}" for status in _ORDER if counts[status]
        )
        table = runs_table(rows, title=self._plan.path.stem, room=room)
        self.live.update(Group(table, Text(summary)), refresh=True)

    def _row(self, run: SweepRun) -> tuple[str, str, str, str]:
        """Returns step, epsilon, accuracy and time of a run in words."""
        started = self._since.get(run.index)
        if run.index not in self._slots or started is None:
            return (*self._progress[run.index], "")
        spent = int(time.monotonic() - started)  # whole seconds, from 0
        return (*self._progress[run.index], duration(spent))


def runs_table(
    rows: Sequence[tuple[SweepRun, RunState, tuple[str, ...]]],
    *,
    title: str,
    room: int,
) -> Table:
    """Returns the table of a sweep's runs.

    Args:
        rows: Each run, how far it is, and step, epsilon, accuracy and time in words.
        title: Heading.
        room: Most rows: of more, those at work and those that failed come first.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in ("step", "epsilon", "accuracy", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = rows
    if len(rows) > room:
        first = sorted(rows, key=lambda row: _ORDER.index(row[1].status))[:room]
        shown = sorted(first, key=lambda row: row[0].index)
    for run, state, words in shown:
        label = Text(run.label)
        if state.error:
            label.append(f"\n{state.error}", style="red")
        style = _STYLES[state.status]
        table.add_row(str(run.index), label, Text(state.status, style=style), *words)
    if len(shown) < len(rows):
        table.caption = f"{len(rows) - len(shown)} more runs are not shown"
    return table
