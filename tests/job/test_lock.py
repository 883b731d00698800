"""Competing jobs, dead owners, clock jumps, unwritable directories."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bpo.job.exits import EXIT_CANNOT_SAVE
from bpo.job.lock import LOCK, RunLock, RunLockError, owner_record

ROOT = Path(__file__).resolve().parents[2]
FAST = {"beat_every_s": 0.05, "stale_s": 0.4}
pytestmark = pytest.mark.timeout(60)


def write_lock(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """The lock of some other job."""
    other = {**owner_record(), **changes}
    (output_dir / LOCK).write_text(json.dumps(other))
    return other


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run", **FAST)
    with pytest.raises(RunLockError, match=rf"in use by process {os.getpid()} on {os.uname().nodename}.*job\.lock"):
        RunLock(tmp_path / "run", **FAST)
    assert lock.lost() is None
    lock.release()
    assert sorted(os.listdir(tmp_path / "run")) == []
    RunLock(tmp_path / "run", **FAST).release()


def test_of_many_that_start_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bpo.job.lock import RunLock, RunLockError\n"
        "try:\n    RunLock(Path(sys.argv[1]))\nexcept RunLockError:\n    sys.exit(3)\ntime.sleep(3)"
    )
    write_lock(tmp_path, pid=dead_pid())  # and all of them find a dead owner
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(6)]
    assert sorted(job.wait() for job in jobs) == [0, 3, 3, 3, 3, 3]


def test_the_lock_of_a_killed_job_on_this_host_is_taken_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bpo.job.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]))\nprint(flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as job:
        assert job.stdout is not None and job.stdout.readline()
        with pytest.raises(RunLockError, match=f"process {job.pid}"):
            RunLock(tmp_path, **FAST)
        job.send_signal(signal.SIGKILL)
    started = time.monotonic()
    RunLock(tmp_path, beat_every_s=0.1, stale_s=60).release()
    assert time.monotonic() - started < 30  # known to be dead: nothing to wait for
    assert f"taken over from process {job.pid}" in caplog.text and "no longer runs" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_later_process_of_the_same_number_is_not_the_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lock(tmp_path, started="1")
    RunLock(tmp_path, **FAST).release()
    assert "no longer runs" in caplog.text


def test_an_owner_on_another_host_is_watched_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    other = write_lock(tmp_path, host="n7", boot="other", job="41")
    beats = tmp_path / f"{LOCK}.{other['token']}"
    beats.write_text("0")
    stop = multiprocessing.Event()
    job = multiprocessing.Process(target=_beat, args=(beats, stop))
    job.start()
    with pytest.raises(RunLockError, match=r"process \d+ on n7, job 41"):
        RunLock(tmp_path, **FAST)
    stop.set()
    job.join()
    RunLock(tmp_path, **FAST).release()
    assert "gave no sign of life" in caplog.text and not beats.exists()


@pytest.mark.parametrize("changes", [{"boot": "this boot:pid:[4026532999]"}, {"host": "n7", "boot": "other"}])
def test_a_task_of_the_same_job_or_a_container_of_the_same_host_is_watched(
    changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another PID namespace the owner's id may be free, or that of another process."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    other = write_lock(tmp_path, pid=dead_pid(), **changes)
    stop = multiprocessing.Event()
    job = multiprocessing.Process(target=_beat, args=(tmp_path / f"{LOCK}.{other['token']}", stop))
    job.start()
    with pytest.raises(RunLockError, match="in use by process"):
        RunLock(tmp_path, **FAST)
    stop.set()
    job.join()


def _beat(path: Path, stop: Any) -> None:
    count = 0
    while not stop.wait(0.02):
        count += 1
        path.write_text(str(count))


def test_a_job_that_slurm_restarts_takes_its_own_lock_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    write_lock(tmp_path, host="n7", boot="other")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    started = time.monotonic()
    RunLock(tmp_path).release()  # with the usual 75 seconds of watching
    assert time.monotonic() - started < 2 and "an earlier start of this job" in caplog.text


@pytest.mark.parametrize("jump_s", [-(10**9), 10**9])
def test_clocks_that_jump_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int) -> None:
    lock = RunLock(tmp_path, **FAST)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    for file in tmp_path.iterdir():
        os.utime(file, (real() + jump_s, real() + jump_s))
    with pytest.raises(RunLockError, match="in use"):
        RunLock(tmp_path, **FAST)
    lock.release()


def test_an_owner_that_lost_its_directory_is_told(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, **FAST)
    write_lock(tmp_path, host="n8")
    assert "now belongs to process" in str(lock.lost()) and "n8" in str(lock.lost())
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "n8"  # another's lock is not removed
    (tmp_path / LOCK).unlink()
    assert "no job" in str(lock.lost())


@pytest.mark.parametrize("content", ["{", "", "{}", "[]", '{"host": 1, "pid": "x", "token": null}'])
def test_a_damaged_lock_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    lock = RunLock(tmp_path, **FAST)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == lock.owner["token"] and lock.lost() is None
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_was_still_being_written_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text("")
    timer = threading.Timer(0.2, write_lock, (tmp_path,))
    timer.start()
    with pytest.raises(RunLockError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, **FAST)


def test_a_file_system_without_hard_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*paths: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    write_lock(tmp_path, pid=dead_pid())
    lock = RunLock(tmp_path, **FAST)
    with pytest.raises(RunLockError, match="in use"):
        RunLock(tmp_path, **FAST)
    lock.release()
    assert os.listdir(tmp_path) == []


def test_an_owner_whose_disk_is_full_still_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(tmp_path, **FAST)
    real = Path.write_text

    def write_text(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == lock._beats:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr("bpo.job.lock.is_running", lambda process: None)  # as seen from another host
    with pytest.raises(RunLockError, match="in use"):
        RunLock(tmp_path, **FAST)
    lock.release()


def test_a_full_disk_is_named_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_text(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(RunLockError, match="No space left on device. Free space there, then .*--resume") as refused:
        RunLock(tmp_path, **FAST)
    assert refused.value.exit_code == EXIT_CANNOT_SAVE


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "run").mkdir(mode=0o555)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom bpo.job.lock import RunLock, RunLockError\n"
        "os.geteuid() or os.setuid(65534)\n"  # root may write anywhere
        "try:\n    RunLock(Path(sys.argv[1]))\nexcept RunLockError as error:\n    print(error)"
    )
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "run cannot be written: this user may not write there. Make it writable" in result.stdout
