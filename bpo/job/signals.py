"""Turns a scheduler's signal, Ctrl-C or a closed terminal into a stop at the next boundary."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType, TracebackType

from bpo.job.exits import Interrupted

logger = logging.getLogger(__name__)

# A launcher forwards the Ctrl-C that its workers have also received from the terminal: torchrun sends them a second
# SIGINT. Only one that comes later is from a user who does not want to wait.
FORWARDED_WITHIN_S = 2.0


class StopRequest:
    """Records SIGTERM, SIGUSR1, SIGUSR2, SIGINT or SIGHUP in a flag that the work reads at its boundaries.

    Handlers are installed on construction; leaving the context restores the previous ones. SIGINT and SIGHUP stay
    ignored where they are, as under nohup. A second Ctrl-C ends the process at once, whatever its main thread does.
    """

    def __init__(self) -> None:
        self.received = False
        self._process = os.getpid()
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
        numbers += [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        # Written by Python's handler in C, also while the main thread is blocked in a collective.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=_end_at_second_ctrl_c, args=(reader,), name="signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        self._descriptor_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._descriptor_before)
        if not isinstance(error, SystemExit):  # then `_ignore` follows
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.write(self._writer, bytes(1))
        os.close(self._writer)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker process, which inherits the handler and gets every signal of the terminal
        again = "already stopping" if self.received else "stopping at the next boundary"
        if number == signal.SIGINT and not self.received:
            again += "; press Ctrl-C again to end at once"
        logger.warning("%s: %s", signal.Signals(number).name, again)
        if not self.received:
            # A launcher's signal may come while the interpreter exits, which would replace the exit code.
            atexit.register(_ignore, list(self._before))
        self.received = True

    def check(self, what: str) -> None:
        """Raises Interrupted if a signal was received; `what` completes its message."""
        if self.received:
            raise Interrupted(f"stopped by a signal; {what}")


def _ignore(numbers: Iterable[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _end_at_second_ctrl_c(reader: int) -> None:
    first_s = None
    while received := os.read(reader, 64):
        if 0 in received:
            break
        if signal.SIGINT in received:
            first_s = first_s or time.monotonic()
            if time.monotonic() - first_s > FORWARDED_WITHIN_S:
                os.write(2, b"second Ctrl-C: ended without waiting for the next boundary\n")
                os._exit(128 + signal.SIGINT)
    os.close(reader)


def leave_signals_to_parent(worker: int = 0) -> None:
    """Keeps a worker process, such as a DataLoader's, alive until its parent ends it.

    Terminals, schedulers and launchers send their signals to workers too. A worker that dies of one is an error in the
    parent, which then cannot stop at a boundary.
    """
    _ignore((signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="signals", daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
