"""Which rank is named when one dies, freezes or hangs.

Ranks are watchdogs of this process and of children; two ranks with DeepSpeed are in test_watchdog_rank_loss.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpo.job.exits import EXIT_RANK_LOST, read_status
from bpo.job.watchdog import Watchdog, heartbeat_path, read_heartbeat

ROOT = Path(__file__).resolve().parents[2]
HOST = os.uname().nodename
pytestmark = pytest.mark.timeout(60)

# A rank that publishes heartbeats until it reads a line on its standard input.
OTHER_RANK = """
import sys
from pathlib import Path
from bpo.job.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), 1, 2, 0.5, end=lambda code: None)
phase = dog.unbounded("step 42")
phase.__enter__()
dog.own.step = 41
print(flush=True)
if sys.stdin.readline() == "end\\n":
    dog.stop()
"""


class Ends(list[int]):
    """Exit codes that a watchdog asked for."""

    def wait(self, timeout_s: float = 10.0) -> float:
        started = time.monotonic()
        while not self and time.monotonic() - started < timeout_s:
            time.sleep(0.01)
        return time.monotonic() - started


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OTHER_RANK, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def watch(output_dir: Path, timeout_s: float, rank: int = 0, world_size: int = 2) -> tuple[Watchdog, Ends]:
    ends = Ends()
    return Watchdog(output_dir, rank, world_size, timeout_s, end=ends.append), ends


def test_a_killed_rank_is_named_with_host_and_last_step(
    tmp_path: Path, other: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    dog, ends = watch(tmp_path, 5.0)
    with dog.unbounded("loading the model"):  # also in a phase without a deadline
        time.sleep(1.0)
        assert not ends
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert ends.wait() < 3 and ends == [EXIT_RANK_LOST]
    line = capfd.readouterr().err.strip()
    assert f"rank 1 on {HOST} (process {other.pid}) died; last finished step 41, then step 42" in line
    assert "\n" not in line and "--resume" in line
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("ended", EXIT_RANK_LOST) and status["message"] in line


def test_a_frozen_rank_is_named_after_the_timeout(
    tmp_path: Path, other: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    dog, ends = watch(tmp_path, 1.0)
    with dog.unbounded("writing the checkpoint"):
        time.sleep(1.5)
        assert not ends  # it publishes heartbeats, although it makes no progress
        other.send_signal(signal.SIGSTOP)
        assert 0.8 < ends.wait() < 4 and ends == [EXIT_RANK_LOST]
    assert f"rank 1 on {HOST} (process {other.pid}) sent no heartbeat" in capfd.readouterr().err


def test_a_main_thread_that_stands_still_names_who_is_furthest_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks in one process: rank 1 never reaches the collective in which rank 0 waits."""
    slow, _ = watch(tmp_path, 3.0, rank=1)
    slow.beat("step 3", 2)
    dog, ends = watch(tmp_path, 1.0)
    for doing in ("step 3", "step 3", "step 3"):
        dog.beat(doing, 2)
    ends.wait()
    assert ends == [EXIT_RANK_LOST]
    error = capfd.readouterr().err
    assert "rank 0 made no progress for 1 s" in error and "rank 1 on" in error
    assert "is furthest behind: last finished step 2, then step 3" in error
    slow.stop()


def test_all_at_one_place_is_said_to_be_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    others = Watchdog(tmp_path, 1, 2, 3.0, end=lambda code: None)
    dog, ends = watch(tmp_path, 1.0)
    for watchdog in (others, dog):
        watchdog.beat("step 3", 2)
    ends.wait()
    assert "nor has any other rank: all wait at the same point" in capfd.readouterr().err
    others.stop()


def test_beats_and_phases_without_bound_keep_it_quiet(tmp_path: Path) -> None:
    dog, ends = watch(tmp_path, 0.5, world_size=1)
    for _ in range(12):
        dog.beat("step 1", 0)
        time.sleep(0.1)
    with dog.unbounded("loading the model"):
        time.sleep(1.2)
    assert not ends
    ends.wait(5)
    assert ends == [EXIT_RANK_LOST]  # the deadline applies again after the phase


def test_a_rank_that_ends_as_it_should_is_not_missed(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    dog, ends = watch(tmp_path, 0.5)
    with dog.unbounded("writing the last checkpoint"):
        other.communicate("end\n")
        time.sleep(1.5)
    dog.stop()
    assert not ends and [read_heartbeat(heartbeat_path(tmp_path, r), "").ended for r in (0, 1)] == [True, True]  # type: ignore[union-attr]


def test_a_rank_that_failed_is_the_culprit(tmp_path: Path) -> None:
    other, _ = watch(tmp_path, 1.0, rank=1)
    other.beat("step 6", 5)
    other.stop("KeyError: 'image'")
    dog, _ = watch(tmp_path, 1.0)
    culprit = str(dog.culprit())
    assert culprit.startswith(f"rank 1 on {HOST}") and "failed (KeyError: 'image'); last finished step 5" in culprit
    dog.stop()


def test_heartbeats_of_an_earlier_start_are_ignored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 1 has not begun to beat; its file is of a job that was killed on this host."""
    dog, _ = watch(tmp_path, 30.0, rank=1)
    dog.stop()
    path = heartbeat_path(tmp_path, 1)
    old = {
        **json.loads(path.read_text()),
        "run": "old",
        "of": "another version",
        "ended": False,
        "pid": 1,
        "started": "0",
    }
    path.write_text(json.dumps(old))
    dog, ends = watch(tmp_path, 1.0)
    with dog.unbounded("starting"):
        time.sleep(0.7)
        assert not ends
        ends.wait()
    assert ends == [EXIT_RANK_LOST] and "rank 1 has published no heartbeat for 1 s" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"run": "r"}'])
def test_a_damaged_heartbeat_counts_as_silence(content: str, tmp_path: Path) -> None:
    (tmp_path / "rank").write_text(content)
    assert read_heartbeat(tmp_path / "rank", "r") is None


def test_0_watches_nothing(tmp_path: Path) -> None:
    dog, ends = watch(tmp_path, 0.0)
    dog.beat("step 1", 0)
    dog.stop()
    assert not ends and not (tmp_path / "heartbeats").exists()
