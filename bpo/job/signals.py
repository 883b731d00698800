"""Turns a scheduler's signal into a stop at the next step boundary."""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

from bpo.job.exits import Interrupted

logger = logging.getLogger(__name__)


class StopRequest:
    """Records SIGTERM, SIGUSR1 or SIGUSR2 in a flag that the work reads at its boundaries.

    Handlers are installed on construction; leaving the context restores the previous ones.
    """

    def __init__(self) -> None:
        self.received = False
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        self._before = {number: signal.signal(number, self._remember) for number in signals}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = "already stopping" if self.received else "stopping at the next boundary"
        logger.warning("%s: %s", signal.Signals(number).name, again)
        self.received = True

    def check(self, what: str) -> None:
        """Raises Interrupted if a signal was received; `what` completes its message."""
        if self.received:
            raise Interrupted(f"stopped by a signal; {what}")
