"""A scheduler's warning (time limit, preemption) becomes a checkpoint at the next step boundary."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

# sysexits.h EX_TEMPFAIL: not done, start again. slurm/train.sh requeues on it.
EXIT_INTERRUPTED = 75


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 or SIGUSR2. The handler only sets a flag: the ranks agree at a step boundary."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            logger.warning("%s: a checkpoint follows after this step", signal.Signals(number).name)
        self.received = True
