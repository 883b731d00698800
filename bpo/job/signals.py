"""Exit codes, and how a scheduler's warning becomes a checkpoint at the next step boundary.

From sysexits.h where it has a fitting code: they do not collide with a shell's (126 and above) or Python's (1, 2).
"""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

# EX_IOERR: no checkpoint can be written. Make room, then --resume; a requeue would only repeat it.
EXIT_CANNOT_SAVE = 74
# EX_TEMPFAIL: a signal came and a checkpoint is written; start again. slurm/train.sh requeues on it.
EXIT_INTERRUPTED = 75
# EX_PROTOCOL: a rank died, froze or hangs; start again.
EXIT_RANK_LOST = 76
# Restarts bring no new checkpoint: do not start again. The number that NVIDIA's resiliency extension uses for it.
EXIT_NO_PROGRESS = 93


class Interrupted(Exception):
    """The work stopped at a boundary because a signal asked for it; a further start goes on. Exit code 75."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 or SIGUSR2. The handler only sets a flag, which the work reads at its boundaries.

    From its making on; as a context, until it is left.
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
        """Raises Interrupted, with a message that `what` is kept, where a signal has come."""
        if self.received:
            raise Interrupted(f"stopped by a signal; {what}")
