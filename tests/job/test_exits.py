"""How the outcome of a job becomes status.json, a log line and the exit code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bpo.checkpoint.save import SaveFailedError
from bpo.job.exits import Interrupted, process_end
from bpo.job.lock import RunLockError
from bpo.job.restarts import NoProgressError


def end(output_dir: Path, error: BaseException | None = None, *, is_main: bool = True) -> tuple[int, list[str]]:
    """The exit code, and whether the process group was left."""
    left: list[str] = []
    try:
        with process_end(output_dir, is_main=is_main, leave_group=lambda: left.append("left")):
            if error is not None:
                raise error
    except SystemExit as outcome:
        return int(outcome.code or 0), left
    return 0, left


def status(output_dir: Path) -> tuple[int, str]:
    content = json.loads((output_dir / "status.json").read_text())
    return content["exit_code"], content["message"]


def test_success_and_interruption_leave_the_group_and_a_status(tmp_path: Path, caplog) -> None:
    assert end(tmp_path) == (0, ["left"]) and status(tmp_path) == (0, "finished")
    assert end(tmp_path, Interrupted("stopped by a signal")) == (75, ["left"])
    assert status(tmp_path) == (75, "stopped by a signal; `--resume` continues")
    assert "stopped by a signal; `--resume` continues" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SaveFailedError("no room"), 74),
        (NoProgressError("3 restarts without a checkpoint"), 93),
        (ValueError("train.lr is -1"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
    ],
)
def test_an_error_that_names_the_fix_ends_with_its_code_and_without_a_traceback(
    error: Exception, code: int, tmp_path: Path, caplog
) -> None:
    assert end(tmp_path, error) == (code, [])
    assert status(tmp_path) == (code, str(error))
    (record,) = caplog.records
    assert record.getMessage() == str(error) and record.exc_info is None


def test_no_status_is_written_into_the_directory_of_another_job_nor_by_another_rank(tmp_path: Path) -> None:
    assert end(tmp_path, RunLockError("in use by process 7")) == (1, [])
    assert end(tmp_path, ValueError("bad"), is_main=False) == (1, [])
    assert not (tmp_path / "status.json").exists()


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.ENOENT, "No such file"), RuntimeError("a bug")])
def test_any_other_error_keeps_its_traceback(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        end(tmp_path, error)
    assert not (tmp_path / "status.json").exists()


def test_a_lost_rank_ends_the_process_although_a_library_would_wait_at_exit(tmp_path: Path) -> None:
    code = f"""
import atexit, pathlib, time
from bpo.job.exits import process_end
from bpo.job.guard import RankLostError
atexit.register(time.sleep, 60)
with process_end(pathlib.Path({str(tmp_path)!r}), is_main=True, leave_group=lambda: None):
    raise RankLostError("rank 1 died")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert result.returncode == 76 and "rank 1 died" in result.stderr
    assert status(tmp_path) == (76, "rank 1 died")
