"""How the outcome of a job becomes status.json, a log line and the exit code."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from bpo.checkpoint.save import SaveFailedError
from bpo.job.exits import Interrupted, process_end, read_status, write_lost_status, write_status
from bpo.job.lock import RunLockError
from bpo.job.rendezvous import RendezvousError
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
    found, message = status(tmp_path)
    assert found == code and str(error) in message
    assert str(tmp_path) in message or not isinstance(error, OSError)
    (record,) = caplog.records
    assert record.getMessage() == message and record.exc_info is None
    assert "--resume" in message or code != 74 or not isinstance(error, OSError)


def test_no_status_is_written_into_the_directory_of_another_job_nor_by_another_rank(tmp_path: Path) -> None:
    assert end(tmp_path, RunLockError("in use by process 7")) == (1, [])
    assert end(tmp_path, ValueError("bad"), is_main=False) == (1, [])
    assert not (tmp_path / "status.json").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("x"), "KeyError: 'x' (test_exits.py:"),
        (OSError(errno.ENOENT, "No such file", "a.png"), "'a.png'"),
        (RuntimeError("two\n lines"), "RuntimeError: two lines (test_exits.py:"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 4096"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "data.num_workers to 0"),
        (
            RuntimeError(
                "Caught KeyError in worker.\nOriginal Traceback (most recent call last):\n  File x\nKeyError: 'y'"
            ),
            "RuntimeError: KeyError: 'y' (test_exits.py:",
        ),
        (KeyError("getpwuid(): uid not found: 4711"), "set the environment variables HOME and USER"),
    ],
)
def test_any_other_error_is_one_line_and_its_traceback_a_file(
    error: Exception, told: str, tmp_path: Path, caplog
) -> None:
    assert end(tmp_path, error) == (1, [])
    code, message = status(tmp_path)
    (record,) = caplog.records
    assert code == 1 and record.getMessage() == message and told in message and "\n" not in message
    (path,) = tmp_path.glob("traceback-*.log")
    assert message.endswith(f"traceback: {path}") and "in end\n    raise error" in path.read_text()


def test_an_error_of_a_library_keeps_its_traceback_although_it_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        json.loads("{")
    assert end(tmp_path, raised.value) == (1, [])
    assert "JSONDecodeError: Expecting property name" in status(tmp_path)[1]
    (path,) = tmp_path.glob("traceback-*.log")
    assert "raw_decode" in path.read_text()


def test_an_error_of_a_worker_process_is_that_of_this_program(tmp_path: Path) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
        pytest.raises(ValueError) as raised,
    ):
        pool.submit(end_with_value_error).result()
    assert end(tmp_path, raised.value) == (1, [])
    assert status(tmp_path) == (1, "train.lr is -1") and not list(tmp_path.glob("traceback-*.log"))


def end_with_value_error() -> None:
    raise ValueError("train.lr is -1")


def test_a_traceback_that_cannot_be_stored_is_shown(tmp_path: Path, capsys, caplog) -> None:
    assert end(tmp_path / "none", KeyError("x")) == (1, [])
    assert "raise error" in capsys.readouterr().err and "cannot be written: No such file" in caplog.text


def test_a_killed_start_leaves_a_running_status_not_the_outcome_of_the_one_before(tmp_path: Path) -> None:
    assert end(tmp_path) == (0, ["left"])
    with process_end(tmp_path, is_main=True, leave_group=lambda: None):
        told = read_status(tmp_path)
    assert (told["state"], told["exit_code"]) == ("running", None)
    assert (told["pid"], told["host"]) == (os.getpid(), os.uname().nodename)
    assert read_status(tmp_path)["state"] == "ended"


@pytest.mark.parametrize(
    "error",
    [RunLockError("in use by process 1"), RendezvousError("port 29500 is in use"), Interrupted("x"), KeyError("x")],
)
def test_a_start_that_fails_leaves_the_status_of_a_running_job_but_ends_its_own(
    error: Exception, tmp_path: Path
) -> None:
    write_status(tmp_path, None, "running", "token")
    of_another = {**read_status(tmp_path), "pid": 1}
    (tmp_path / "status.json").write_text(json.dumps(of_another))
    code, _ = end(tmp_path, error)
    assert code and read_status(tmp_path) == of_another
    write_status(tmp_path, 0, "finished")
    assert end(tmp_path, error)[0] == status(tmp_path)[0] == code


@pytest.mark.parametrize(
    ("before", "is_main", "written"),
    [
        ((None, "running", "this"), True, True),
        ((None, "running", "this"), False, True),  # rank 0 is dead
        ((74, "disk full", "this"), False, False),  # rank 0 has told why
        ((None, "running", "later"), True, False),  # frozen until another start had begun
        ((None, "running", "later"), False, False),
    ],
)
def test_a_lost_rank_is_in_the_status_of_its_own_start(
    before: tuple[int | None, str, str], is_main: bool, written: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("bpo.job.exits._FIRST_RANK_S", 0.0)
    write_status(tmp_path, *before)
    write_lost_status(tmp_path, "rank 1 died", "this", is_main=is_main)
    assert status(tmp_path) == ((76, "rank 1 died") if written else before[:2])


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
