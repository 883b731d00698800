"""Saves in the background: copy to host memory, write and hash in a thread, commit at a later step boundary.

    step n       every rank copies its shard to host memory; a thread writes, syncs and hashes it
    step n + k   every rank's thread has finished (found by one small all-reduce per step): rank 0 writes the manifest,
                 renames the folder and updates the pointer. Only then is `saved` logged.

No collective runs in a thread. A failed save (disk full, quota, I/O error) is logged as an error and its files are
removed; older checkpoints are kept. It is retried after the next step; a second failure in a row ends the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bpo.checkpoint.files import (
    CheckpointError,
    Hook,
    apply_retention,
    best_step,
    checkpoints_root,
    commit,
    mark_best,
    no_hook,
    remove_unfinished,
    seal_file,
    step_dir,
)
from bpo.checkpoint.shards import Shard, shard_name
from bpo.job.collectives import Collectives
from bpo.job.durable import sync_directory
from bpo.job.exits import EXIT_CANNOT_SAVE, JobError

logger = logging.getLogger(__name__)

# Two attempts: a transient I/O error must not end a run, and a full disk must not leave hours of training unsaved.
ATTEMPTS = 2
_POLL_S = 0.05
# Space for the manifest and file system metadata, in addition to the shards.
_SPARE_BYTES = 1 << 20


class SaveFailedError(JobError):
    """No checkpoint could be written; names the I/O error and the latest valid checkpoint."""

    exit_code = EXIT_CANNOT_SAVE


class CheckpointSaver:
    """Saves the training state; every rank makes the same calls in the same order.

    Args:
        take: Returns the live training state of this rank.
        describe: Returns the manifest of a step, without its files.
        keep_last: Number of latest checkpoints to keep; 0 keeps all.
        keep_every: Also keep checkpoints at multiples of this many steps; 0 keeps none.
        in_background: Write while training continues, at the cost of a copy of the state in host memory.
        at_stage: Called at every stage of `files.STAGES`; for tests.
        waiting: Context in which training waits for the disk.
    """

    def __init__(
        self,
        output_dir: Path,
        job: Collectives,
        take: Callable[[], Shard],
        describe: Callable[[int], dict[str, Any]],
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        in_background: bool = True,
        at_stage: Hook = no_hook,
        waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.output_dir, self.job, self.take, self.describe = output_dir, job, take, describe
        self.keep_last, self.keep_every, self.in_background = keep_last, keep_every, in_background
        self.at_stage, self.waiting = at_stage, waiting
        self.newest: str | None = None
        # Step of the best checkpoint, or of the one that is being written as such.
        self.best: int | None = job.gather(best_step(output_dir) if job.rank == 0 else None)[0]
        self._best_before = self.best
        self._buffers: dict[str, torch.Tensor] = {}
        self._writer: threading.Thread | None = None
        self._cleaner: threading.Thread | None = None
        self._step, self._temporary = 0, Path()
        self._written: dict[str, Any] | None = None
        self._problem: str | None = None
        self._failures = 0
        self._started_at = self._blocked_s = 0.0

    def boundary(self, step: int, *, due: bool, stop: bool, best: bool = False) -> bool:
        """Called after each step on all ranks: commits a written save, starts one that is due or has to be retried.

        Args:
            due: Whether to save this step; the same on every rank.
            stop: Whether this rank was asked to stop; one rank is enough for a checkpoint.
            best: Whether to save this step and name it in `checkpoints/best`; the same on every rank.

        Returns:
            Whether any rank was asked to stop.

        Raises:
            SaveFailedError: two saves in a row failed.
        """
        stopping, failed, written = self.job.sum([float(stop), *self._state()])
        if self._writer is not None:
            self._settle(failed > 0, written == self.job.world_size)
        missed = self._writer is None and self._failures > 0
        if due or missed or stopping or best:
            self._wait()
            self._start(step, best=best)
            if not self.in_background:
                self._wait()
        return stopping > 0

    def mark_best(self, step: int) -> None:
        """Names the finished checkpoint of `step` in `checkpoints/best`."""
        self.best = step
        if self.job.rank == 0:
            mark_best(self.output_dir, step)

    def finish(self, step: int) -> None:
        """Waits until the current save is committed; a failed one is retried once, with the state of `step`.

        Raises:
            SaveFailedError: no attempt is left.
        """
        self._wait()
        if self._failures:
            self._start(step)
            self._wait()
        if self._cleaner is not None:
            self._cleaner.join()

    def _wait(self) -> None:
        with self.waiting():
            while self._writer is not None:
                failed, written = self.job.sum(self._state())
                self._settle(failed > 0, written == self.job.world_size)
                if self._writer is not None:
                    time.sleep(_POLL_S)

    def _state(self) -> list[float]:
        return [float(self._problem is not None), float(self._written is not None)]

    def _start(self, step: int, *, best: bool = False) -> None:
        self._best_before, self.best = self.best, step if best else self.best
        began = time.perf_counter()
        shard = self.take()
        sizes = self.job.gather((shard.num_bytes, shard.is_finite()))
        self._check_finite(step, [finite for _, finite in sizes])
        needed = sum(size for size, _ in sizes) + _SPARE_BYTES
        token, problem = self.job.gather(self._make_room(step, needed) if self.job.rank == 0 else ("", None))[0]
        self._step, self._written, self._problem = step, None, problem
        self._temporary = checkpoints_root(self.output_dir) / f"{step_dir(self.output_dir, step).name}.{token}.tmp"
        host = shard.to_host(self._buffers) if problem is None and self.in_background else shard
        self._writer = threading.Thread(target=self._write, args=(host,), name="checkpoint", daemon=True)
        self._started_at, self._blocked_s = began, time.perf_counter() - began
        self._writer.start()

    def _check_finite(self, step: int, finite: list[bool]) -> None:
        """A step may end with a finite loss and gradient, and weights that are not; the next loss would show it."""
        if not all(finite):
            kept = f"the latest checkpoint, {self.newest}, is valid" if self.newest else "older checkpoints are valid"
            ranks = ", ".join(str(rank) for rank, is_finite in enumerate(finite) if not is_finite)
            raise CheckpointError(
                f"the weights after step {step} contain NaN or infinite values (on ranks {ranks}) "
                f"and are not saved; {kept}. Lower train.lr, set train.max_grad_norm, or use float32"
            )

    def _make_room(self, step: int, needed: int) -> tuple[str, str | None]:
        """Creates the folder and checks the free disk space before anything is written."""
        token = os.urandom(4).hex()  # not the folder of an earlier attempt, which may contain files
        root = checkpoints_root(self.output_dir)
        try:
            (root / f"{step_dir(self.output_dir, step).name}.{token}.tmp").mkdir(parents=True)
            free = shutil.disk_usage(root).free
        except OSError as error:
            return token, f"{root} cannot be written: {error}"
        if free < needed:
            return token, f"{root}: the checkpoint needs {needed:,} bytes, {free:,} are free"
        return token, None

    def _write(self, shard: Shard) -> None:
        """Writes this rank's file, in the thread; all ranks learn of an error at the next boundary."""
        if self._problem is not None:
            return
        path = self._temporary / shard_name(self.job.rank)
        try:
            self.at_stage("temporary")
            shard.write(path)
            self.at_stage("written")
            entry = seal_file(path)
            sync_directory(self._temporary)
            self.at_stage("hashed")
            self._written = {path.name: entry}
        except Exception as error:  # of any kind: it would only end the thread
            self._problem = f"{path}: {type(error).__name__}: {error}"

    def _settle(self, failed: bool, all_written: bool) -> None:
        """Ends the current save if it has failed on any rank or is written on all."""
        if not failed and not all_written:
            return
        assert self._writer is not None
        self._writer.join()
        parts = self.job.gather((self._written, self._problem))
        problems = [problem for _, problem in parts if problem is not None]
        if not problems:
            files = {name: entry for part, _ in parts for name, entry in (part or {}).items()}
            outcome = self.job.gather(self._commit(files) if self.job.rank == 0 else None)[0]
            problems = [outcome] if outcome else []
        self._writer = None
        if problems:
            self._fail(problems)
        else:
            self._failures, self.newest = 0, step_dir(self.output_dir, self._step).name

    def _commit(self, files: dict[str, Any]) -> str | None:
        final = step_dir(self.output_dir, self._step)
        if self._cleaner is not None:
            self._cleaner.join()
        try:
            commit(self._temporary, final, {**self.describe(self._step), "files": files}, self.at_stage)
            if self.best == self._step:
                mark_best(self.output_dir, self._step)
        except (OSError, CheckpointError) as error:
            return f"{final}: {type(error).__name__}: {error}"
        logger.info(
            "saved %s: %.1f MB in %.2f s, training waited %.3f s for the copy",
            final,
            sum(entry["bytes"] for entry in files.values()) / 1e6,
            time.perf_counter() - self._started_at,
            self._blocked_s,
        )
        self._cleaner = threading.Thread(target=self._clean, name="checkpoint retention", daemon=True)
        self._cleaner.start()
        return None

    def _clean(self) -> None:
        self.at_stage("retention")
        apply_retention(self.output_dir, self.keep_last, self.keep_every)

    def _fail(self, problems: list[str]) -> None:
        self._failures += 1
        self._problem = None
        self.best = self._best_before  # the retry has the weights of a later step
        if self.job.rank == 0:
            remove_unfinished(self._temporary)
        self.job.gather(None)  # no rank retries before the space is freed
        kept = f"latest valid checkpoint: {self.newest}" if self.newest else "older checkpoints are unaffected"
        text = f"the checkpoint of step {self._step} could not be written: {'; '.join(problems)}; {kept}"
        if self._failures >= ATTEMPTS:
            raise SaveFailedError(
                f"{text}. That was attempt {self._failures} in a row: free space (or lower train.keep_last, or put "
                "train.output_dir on another disk) and continue with --resume"
            )
        if self.job.rank == 0:
            logger.error("%s; trying again after the next step", text)
