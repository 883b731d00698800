"""Saving in the background, and disk errors.

One process; the kills of several are in test_save_kills.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_worker import Run, stored_step

from bpo.checkpoint.files import (
    STAGES,
    CheckpointError,
    best_step,
    checkpoint_dirs,
    checkpoints_root,
    newest_valid_checkpoint,
    step_dir,
)
from bpo.checkpoint.save import SaveFailedError

pytestmark = pytest.mark.timeout(60)


def steps_of(output_dir: Path) -> list[int]:
    """Steps of the checkpoints that verify and hold the state of their step."""
    found = []
    for directory in checkpoint_dirs(output_dir):
        result = newest_valid_checkpoint(output_dir)
        assert result is not None and stored_step(*result) == result[1]["step"]
        found.append(result[1]["step"])
        directory.rename(directory.with_suffix(".seen"))
    for seen in checkpoints_root(output_dir).glob("*.seen"):
        seen.rename(seen.with_suffix(""))
    return sorted(found)


class Gate:
    """An `at_stage` that notes the stages and can hold the writing thread at one of them."""

    def __init__(self, hold: str = "") -> None:
        self.stages: list[str] = []
        self.threads: dict[str, str] = {}
        self.hold, self.reached, self.open = hold, threading.Event(), threading.Event()

    def __call__(self, stage: str) -> None:
        self.stages.append(stage)
        self.threads[stage] = threading.current_thread().name
        if stage == self.hold:
            self.reached.set()
            assert self.open.wait(30)


def test_the_stages_come_in_their_order_and_the_long_ones_in_a_thread(tmp_path: Path) -> None:
    gate = Gate()
    Run(tmp_path, at_stage=gate).save(10)
    assert tuple(gate.stages) == STAGES
    main = [stage for stage in STAGES if gate.threads[stage] == "MainThread"]
    assert main == ["manifest", "renamed", "pointer"]


def test_training_goes_on_while_a_checkpoint_is_written_and_its_state_is_that_of_its_step(tmp_path: Path) -> None:
    gate = Gate("temporary")
    run = Run(tmp_path, at_stage=gate)
    run.to(10)
    assert gate.reached.wait(10)
    for step in (11, 12):  # the thread has not written a byte yet
        run.to(step, due=False)
    assert checkpoint_dirs(tmp_path) == []
    gate.open.set()
    run.saver.finish(12)
    assert steps_of(tmp_path) == [10]


def test_it_is_committed_at_a_step_boundary_and_only_then_said_to_be_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate("hashed")
    run = Run(tmp_path, at_stage=gate)
    run.to(10)
    assert gate.reached.wait(10)
    run.to(11, due=False)
    assert "saved" not in caplog.text and checkpoint_dirs(tmp_path) == []
    gate.open.set()
    run.saver._writer.join()  # type: ignore[union-attr]
    assert checkpoint_dirs(tmp_path) == []
    run.to(12, due=False)
    assert "saved" in caplog.text and steps_of(tmp_path) == [10]


def test_a_save_that_is_due_waits_for_the_one_before(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in range(1, 8):
        run.to(step)
    run.saver.finish(7)
    assert steps_of(tmp_path) == list(range(1, 8))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, value: str) -> None:
    """The last step of a run may end so with a finite loss: nothing would show it but the model."""
    run = Run(tmp_path)
    run.save(10)
    take, where = run.saver.take, 1

    def spoiled() -> Any:
        shard = take()
        shard.tensors = {**shard.tensors, "master.0": shard.tensors["master.0"].clone()}
        shard.tensors["master.0"][where] = float(value)
        return shard

    run.saver.take = spoiled
    run.save(10)  # in the padding, which ZeRO-3 does not initialise
    where = 17
    with pytest.raises(
        CheckpointError, match=r"weights after step 11 contain NaN.*latest.*step-00000010, is valid.*train.lr"
    ):
        run.save(11)
    assert steps_of(tmp_path) == [10] and [d.name for d in checkpoint_dirs(tmp_path)] == ["step-00000010"]


def test_in_the_foreground_it_is_committed_when_the_call_returns(tmp_path: Path) -> None:
    Run(tmp_path, in_background=False).to(10)
    assert steps_of(tmp_path) == [10]


def test_a_stop_saves_at_once_and_is_told_to_the_caller(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.to(9, due=False) is False and run.to(10, due=False, stop=True) is True
    run.saver.finish(10)
    assert steps_of(tmp_path) == [10]


def test_host_memory_is_taken_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(10)
    before = {name: buffer.data_ptr() for name, buffer in run.saver._buffers.items()}
    run.save(20)
    assert before and {name: buffer.data_ptr() for name, buffer in run.saver._buffers.items()} == before


def test_retention_follows_each_save(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 9):
        run.save(step)
    assert steps_of(tmp_path) == [4, 7, 8]


def test_the_best_is_saved_when_it_is_found_and_kept_until_another_is_better(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1, in_background=False)
    for step in range(1, 6):
        run.to(step, due=step == 5, best=step in (2, 3))
    run.saver.finish(5)
    assert steps_of(tmp_path) == [3, 5] and best_step(tmp_path) == run.saver.best == 3
    again = Run(tmp_path, keep_last=1)
    assert again.saver.best == 3  # a resumed run knows it
    again.save(6)
    again.saver.mark_best(6)
    again.save(7)
    again.save(8)
    assert steps_of(tmp_path) == [6, 8]


def test_a_best_checkpoint_is_named_only_once_it_is_complete(tmp_path: Path) -> None:
    seen: list[int | None] = []
    run = Run(tmp_path, at_stage=lambda stage: seen.append(best_step(tmp_path)) if stage == "renamed" else None)
    run.to(1, best=True)
    run.saver.finish(1)
    run.to(2, due=False, best=True)
    assert best_step(tmp_path) == 1
    run.saver.finish(2)
    assert seen == [None, 1] and best_step(tmp_path) == 2


def test_the_retry_of_a_failed_best_save_is_not_the_best(tmp_path: Path) -> None:
    """It has the weights of a later step."""
    Run(tmp_path).save(1)
    run = Run(tmp_path, at_stage=fail_once(OSError, 5, "Input/output error"), in_background=False)
    run.saver.mark_best(1)
    run.to(2, best=True)
    assert run.saver.best == 1
    run.to(3, due=False)
    assert steps_of(tmp_path) == [1, 3] and best_step(tmp_path) == 1


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A tmpfs of 40 KB where that can be mounted, else a limit on the size of files, which fails in the same way."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(path)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard takes 12.5 KB: one checkpoint fits next to the ballast, a second does not."""
    disk = tmp_path / "disk"
    monkeypatch.setattr("bpo.checkpoint.save._SPARE_BYTES", -(10**9))  # as under a quota: not in disk_usage
    with small_disk(disk):
        if os.path.ismount(disk):
            (disk / "ballast").write_bytes(bytes(8_000))
            Run(disk, keep_last=1).save(10)
        run = Run(disk, keep_last=1)
        run.to(20)
        run.saver._wait()
        assert "step 20 could not be written" in caplog.text and "trying again" in caplog.text
        assert "No space left" in caplog.text or "File too large" in caplog.text
        assert not list(checkpoints_root(disk).glob("*.tmp"))
        assert steps_of(disk) == ([10] if os.path.ismount(disk) else [])
        with pytest.raises(SaveFailedError, match=r"attempt 2 in a row.*--resume"):
            run.to(21, due=False)
            run.saver.finish(21)
        assert steps_of(disk) == ([10] if os.path.ismount(disk) else [])


def test_too_little_room_is_found_before_a_byte_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gate = Run(tmp_path, keep_last=1), Gate()
    run.save(10)
    run.saver.at_stage = gate
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("bpo.checkpoint.save.shutil.disk_usage", lambda _: usage._replace(free=1_000_000))
    run.to(20)
    run.saver._wait()
    assert (
        "1,060,648 bytes, 1,000,000 are free" in caplog.text and "latest valid checkpoint: step-00000010" in caplog.text
    )
    assert gate.stages == [] and steps_of(tmp_path) == [10]
    monkeypatch.undo()
    run.to(21, due=False)  # space was freed: retried after the next step, due or not
    run.saver.finish(21)
    assert steps_of(tmp_path) == [21]


def fail_once(kind: type[Exception], *arguments: Any) -> Callable[[str], None]:
    left = [1]

    def at_stage(stage: str) -> None:
        if stage == "written" and left:
            left.pop()
            raise kind(*arguments)

    return at_stage


@pytest.mark.parametrize("error", [(OSError, 5, "Input/output error"), (RuntimeError, "any bug")])
def test_what_goes_wrong_in_the_thread_comes_out_at_the_next_boundary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: tuple[Any, ...]
) -> None:
    run = Run(tmp_path, at_stage=fail_once(*error))
    run.to(10)
    run.saver._writer.join()  # type: ignore[union-attr]
    assert "could not be written" not in caplog.text
    run.to(11, due=False)
    assert f"step 10 could not be written: {tmp_path}" in caplog.text and str(error[-1]) in caplog.text
    run.saver.finish(11)
    assert steps_of(tmp_path) == [11]


def test_a_failure_in_the_last_save_is_tried_again_before_the_run_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, at_stage=fail_once(OSError, 5, "Input/output error"))
    run.save(10)
    assert steps_of(tmp_path) == [10]


def test_a_failed_commit_is_a_failed_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def steal(stage: str) -> None:
        if stage == "hashed":  # another node wrote to another file system
            for file in checkpoints_root(tmp_path).glob("*.tmp/rank*"):
                file.unlink()

    run = Run(tmp_path, at_stage=steal)
    run.to(10)
    run.saver._wait()
    assert "rank 0 finds none; is train.output_dir on a file system that all nodes share?" in caplog.text
    assert checkpoint_dirs(tmp_path) == [] and not step_dir(tmp_path, 10).exists()


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
