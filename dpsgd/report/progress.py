"""The progress of a run: a live bar in a terminal, plain lines elsewhere."""

import math
import time
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpsgd.privacy import rounded_up
from dpsgd.report.live import LiveView

__all__ = ["ProgressView"]

_SECONDS_BETWEEN_LINES = 30.0


class ProgressView(LiveView[Progress]):
    """Shows steps, epsilon spent, views a second, time left and last accuracy.

    Args:
        console: A terminal gets a bar, anything else a line from time to time.
        num_steps: Steps of the run.
        step: Steps taken already.
    """

    def __init__(self, console: Console, *, num_steps: int, step: int) -> None:
        super().__init__(console, partial(_bar, console))
        self._num_steps = num_steps
        self._last_line = time.monotonic()
        if self.live:
            self._task = self.live.add_task(
                "", total=num_steps, completed=step, status=""
            )

    def show_step(self, step: int, *, epsilon: float, views_per_second: float) -> None:
        """Shows a step just taken.

        Args:
            step: Steps taken.
            epsilon: Upper bound spent after them.
            views_per_second: Throughput so far.
        """
        status = f"{_spent(epsilon, 3)}  {views_per_second:,.0f} views/s"
        if self.live:
            self.live.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._say(f"step {step}/{self._num_steps}  {status}")

    def show_evaluation(
        self, step: int, *, epsilon: float, accuracies: dict[str, float]
    ) -> None:
        """Prints a line for an evaluation.

        Args:
            step: Steps taken.
            epsilon: Upper bound spent after them.
            accuracies: Test accuracy in [0, 1] by kind of weights.
        """
        shown = "  ".join(f"{name} {value:.2%}" for name, value in accuracies.items())
        spent = f"step {step}/{self._num_steps}  {_spent(epsilon)}"
        self._say(f"{spent}  test: {shown}")

    def _say(self, text: str) -> None:
        """Prints one line, and notes when."""
        self._last_line = time.monotonic()
        self.print_line(text)


def _bar(console: Console) -> Progress:
    """Returns the bar of a terminal."""
    return Progress(
        TextColumn("[bold]training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def _spent(epsilon: float, digits: int = 4) -> str:
    """Returns a bound on epsilon in words."""
    if not math.isfinite(epsilon):
        return "NO privacy guarantee"
    return f"eps <= {rounded_up(epsilon, digits)}"
