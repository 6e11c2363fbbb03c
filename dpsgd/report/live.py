"""What is shown as it happens: live in a terminal, in plain lines elsewhere."""

from collections.abc import Callable
from typing import Generic, Self, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import Progress

__all__ = ["LiveView"]

_Display = TypeVar("_Display", Live, Progress)


class LiveView(Generic[_Display]):
    """A view whose display is live while it is entered.

    Attributes:
        console: Where it shows.
        live: The display; None where the console is no terminal.

    Args:
        console: A terminal, or anything that takes lines.
        make_live: Makes the display of a terminal.
    """

    def __init__(self, console: Console, make_live: Callable[[], _Display]) -> None:
        self.console = console
        self.live: _Display | None = make_live() if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self.live:
            self.live.stop()

    def print_line(self, text: str) -> None:
        """Prints one line, above the display if there is one.

        Args:
            text: Shown as it is.
        """
        self.console.print(text, highlight=False, soft_wrap=True)
