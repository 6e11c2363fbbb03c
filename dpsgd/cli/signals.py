"""A request to stop, as a signal brings it, that waits for a good moment."""

import signal
import time
from types import FrameType
from typing import Any

from dpsgd.parallel import Ranks

__all__ = ["SIGNAL_EXIT", "StopSignal"]

SIGNAL_EXIT = 128  # a shell's code for a process that a signal ended
_GRACE_SECONDS = 2.0


class StopSignal:
    """Remembers SIGTERM or SIGINT; a later second one ends the process at once.

    Process managers send a signal to the process and again to its group, so what
    follows within the grace period is the same request.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)

    def agreed(self, ranks: Ranks) -> bool:
        """Returns whether any rank was asked to stop: then all were, to this one."""
        self.received = ranks.largest(self.received or 0) or None
        return self.received is not None

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > _GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
