"""Run supervision: directory lock, restart cap, watchdog."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from bpo.config.training import TrainConfig
from bpo.job.collectives import from_rank_0
from bpo.job.exits import EXIT_CANNOT_SAVE, EXIT_RANK_LOST, Interrupted, JobError, exit_code_of, write_status
from bpo.job.launch import Ranks
from bpo.job.lock import RunLock
from bpo.job.restarts import RestartCount
from bpo.job.watchdog import Watchdog


class RankLostError(JobError):
    """Another rank died, failed or froze; names it, its host and its last step."""

    exit_code = EXIT_RANK_LOST

    def __init__(self, message: str, run: str = ""):
        super().__init__(message)
        self.run = run


class RunGuard:
    """A context in which one job owns `train.output_dir` and detects lost ranks.

    Entering raises RunLockError on all ranks if another job owns the directory or it cannot be written.

    Args:
        clean: Removes the leftovers of a killed job from the directory; called on rank 0 once the lock is held.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, clean: Callable[[Path], None]):
        self.config, self.ranks, self._clean = config, ranks, clean
        self.output_dir = Path(config.output_dir)
        self._lock: RunLock | None = None
        self._counted: RestartCount | None = None  # until the first step begins
        self.closing = contextlib.ExitStack()  # of what is closed at the end of the job; to be entered

    def __enter__(self) -> RunGuard:
        run = from_rank_0(self._own_directory)
        try:
            timeout_s = self.config.hang_timeout_seconds
            self.watchdog = Watchdog(self.output_dir, self.ranks.rank, self.ranks.world_size, timeout_s, run)
        except BaseException:
            self._release()
            raise
        self.watchdog.moving = False  # until the first forward pass: imports, hashing and loading have no deadline
        return self

    def _own_directory(self) -> str:
        self._lock = RunLock(self.output_dir)
        run = str(self._lock.owner["token"])
        write_status(self.output_dir, None, "running", run)
        self._clean(self.output_dir)
        return run

    def count_restart(self, step: int) -> None:
        """Counts a resumed start; called on all ranks before the work begins.

        Raises:
            NoProgressError: `train.max_idle_restarts` restarts have not gone past the checkpoint of `step`.
        """
        if self.config.resume:
            count = RestartCount(self.output_dir)
            from_rank_0(lambda: count.start(step, self.config.max_idle_restarts))
            self._counted = count if self.ranks.is_main else None

    @contextlib.contextmanager
    def progress_if_interrupted(self) -> Iterator[None]:
        """Resets the restart count if a stop request ends the body, which makes progress without a checkpoint."""
        try:
            yield
        except Interrupted:
            if self.ranks.is_main:
                RestartCount(self.output_dir).clear()
            raise

    def lost(self) -> str | None:
        """The job that took over the directory, or None; rank 0 asks before it names a checkpoint."""
        return self._lock.lost() if self._lock is not None else None

    def phase(self, doing: str) -> contextlib.AbstractContextManager[Any]:
        """A phase of any length without heartbeats of the main thread, such as loading a model."""
        return self.watchdog.unbounded(doing)

    def at_step(self, step: int) -> None:
        """Records that `step` steps are finished."""
        self._counted = None
        self.watchdog.moving = True
        self.watchdog.beat(f"step {step + 1}", step)

    def in_forward(self) -> None:
        """Records the start of a forward pass; from the first one on, each rank must reach the next in time."""
        self.watchdog.moving = True
        self.watchdog.beat(self.watchdog.own.doing)

    def after_reference(self) -> None:
        """Suspends the deadline while the checkpoint is loaded and the data loader fills."""
        self.watchdog.moving = False
        self.watchdog.beat("starting the steps")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = None
        # On the surviving ranks a collective fails with a transport error; the heartbeats name the rank at fault.
        if (
            isinstance(error, RuntimeError)
            and not type(error).__module__.startswith("bpo.")
            and self.ranks.world_size > 1
        ):
            lost = self.watchdog.culprit()
            if lost is None and "timed out" in str(error).lower() and self.config.hang_timeout_seconds:
                what = "a collective timed out; if a rank is only slow, set DEEPSPEED_TIMEOUT to more minutes"
                lost = self.watchdog.verdict(what)
        clean_exit = error is None or isinstance(error, Interrupted)
        self.watchdog.stop("" if clean_exit else f"{type(error).__name__}: {error}"[:300])
        if self._counted is not None and error is not None and exit_code_of(error) in (1, EXIT_CANNOT_SAVE):
            with contextlib.suppress(OSError):
                self._counted.undo()  # refused, such as for other data than the checkpoint's, or a disk still full
        self._release()
        if error is None and self.ranks.is_main:
            RestartCount(self.output_dir).clear()
        if lost is not None:
            raise RankLostError(
                f"the job ends here: {lost}. Continue with --resume (exit code {EXIT_RANK_LOST})",
                self.watchdog.own.run,
            ) from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
