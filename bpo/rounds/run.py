"""`bpo rounds`: runs the stages that are not finished, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from bpo.config.io import load_config
from bpo.config.training import Config
from bpo.job.durable import write_durably
from bpo.job.exits import EXIT_INTERRUPTED, Interrupted, JobError
from bpo.job.journal import JournalWriter, to_line
from bpo.job.lock import RunLock
from bpo.job.run_record import write_run_record
from bpo.job.signals import StopRequest
from bpo.rounds.plan import check_unchanged, plan_rounds
from bpo.rounds.processes import run_stage
from bpo.rounds.stages import Stage

logger = logging.getLogger(__name__)

Runner = Callable[[Stage, int, StopRequest | None], int]
HISTORY = "stages.jsonl"


class StageFailed(JobError):
    """A stage failed; the message has the end of its log."""

    def __init__(self, stage: Stage, code: int, log: str):
        super().__init__(f"{stage.label} failed with code {code}; {stage.log_file} ends with:\n{log}")
        self.exit_code = code


def prepare(config: Config) -> list[Stage]:
    """The stages that are not finished, with their configurations written.

    Raises:
        ValueError: See `plan_rounds` and `check_unchanged`.
    """
    todo = []
    for stage in plan_rounds(config):
        if stage.is_finished():
            check_unchanged(stage)
        else:
            todo.append(stage)
    write_run_record(config, Path(config.rounds.output_dir))
    for stage in todo:
        stage.folder.mkdir(parents=True, exist_ok=True)
        write_stage_config(stage)
    for stage in {stage.round: stage for stage in todo}.values():
        _check_options(stage)
    return todo


def _check_options(stage: Stage) -> None:
    """Raises ValueError now, and not when the round begins, for a value of its options that is out of range."""
    try:
        load_config(["--config", str(stage.config_file)], prog="bpo rounds")
    except ValueError as error:
        raise ValueError(f"rounds.each[{stage.round - 1}].options: {error}") from error


def write_stage_config(stage: Stage) -> None:
    import yaml

    write_durably(stage.config_file, yaml.safe_dump(dict(stage.options), sort_keys=False), sync=False)


def run_rounds(config: Config, stop: StopRequest | None = None, run: Runner = run_stage) -> None:
    """Runs every stage that is not finished. Killed anywhere, it goes on in the stage where it was.

    Args:
        run: Runs one stage and returns its exit code.

    Raises:
        ValueError: See `prepare`.
        StageFailed: A stage failed.
        Interrupted: `stop` was received; what the stage has finished is kept.
        RunLockError: Another process runs these rounds.
    """
    root = Path(config.rounds.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    lock = RunLock(root)
    try:
        todo = prepare(config)
        logger.info("%s: %d stages to run", root, len(todo))
        with JournalWriter(root / HISTORY, exclusive=False) as history:
            for stage in todo:
                _run_one(stage, config, stop, run, history)
    finally:
        lock.release()


def _run_one(stage: Stage, config: Config, stop: StopRequest | None, run: Runner, history: JournalWriter) -> None:
    if stop is not None:
        stop.check(f"{stage.label} is next")
    logger.info("%s: started; log: %s", stage.label, stage.log_file)
    started = time.monotonic()
    code = run(stage, config.rounds.processes, stop)
    seconds = round(time.monotonic() - started, 1)
    history.append(to_line({"round": stage.round, "stage": stage.name, "seconds": seconds, "code": code}))
    if code == EXIT_INTERRUPTED or (code and stop is not None and stop.received):
        raise Interrupted(f"{stage.label} was stopped by a signal; run the same command to go on")
    if code:
        raise StageFailed(stage, code, _end_of(stage.log_file))
    if not stage.is_finished():
        raise StageFailed(stage, 1, _end_of(stage.log_file) + f"\n(it ended without {stage.result})")
    logger.info("%s: finished in %.1f s: %s", stage.label, seconds, stage.result)


def _end_of(log: Path, lines: int = 20) -> str:
    """The last lines of a log, without progress bars."""
    try:
        text = log.read_bytes()[-16_384:].decode("utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join([line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()][-lines:])
