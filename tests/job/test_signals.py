"""Signals, and progress when one is received."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpo.checkpoint.files import CheckpointError, clean_leftovers
from bpo.config.training import TrainConfig
from bpo.job.exits import Interrupted
from bpo.job.guard import RankLostError, RunGuard
from bpo.job.launch import Ranks
from bpo.job.restarts import RestartCount
from bpo.job.signals import StopRequest, leave_signals_to_parent
from bpo.job.watchdog import Watchdog


@pytest.fixture
def usual_handlers() -> Iterator[None]:
    """Those of an interactive start: a test run in the background may have some of them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name
)
def test_a_signal_is_remembered_until_the_next_boundary(number: signal.Signals, usual_handlers: None, caplog) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check("nothing is kept")
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="stopped by a signal; 3 answers are kept"):
            stop.check("3 answers are kept")
    assert f"{number.name}: stopping at the next boundary" in caplog.text and "already stopping" in caplog.text
    assert signal.getsignal(number) == before


# Blocked where no Python handler runs, as in a collective: only the thread of the signals notices.
BLOCKED = """
import ctypes, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from bpo.job.signals import StopRequest
stop = StopRequest()
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True)
libc = ctypes.CDLL(None)
for _ in range(4):
    libc.sleep(30)
"""


def test_a_second_ctrl_c_ends_at_once_but_a_forwarded_one_does_not() -> None:
    command = ["nohup", sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "True\n"  # ignored by nohup: it stays so
        for _ in range(2):  # the terminal's, and the launcher's
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        errors = process.stderr.read()
    assert "second Ctrl-C" in errors and "Traceback" not in errors


ENDING = """
import atexit, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from bpo.job.signals import StopRequest
class AtTheEnd:
    def __del__(self):
        print("ending", flush=True)
        time.sleep(1)
kept = AtTheEnd()  # deleted after the interpreter has reset its handlers
with StopRequest() as stop:
    print("started", flush=True)
    while not stop.received:
        time.sleep(0.01)
    sys.exit(75)
"""


def test_a_signal_while_the_interpreter_exits_does_not_replace_the_exit_code() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75


def test_a_worker_ends_with_its_parent_only() -> None:
    worker = multiprocessing.get_context("fork").Process(target=_work, daemon=True)
    worker.start()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM):
        subprocess.run(["sh", "-c", f"sleep 0.3; kill -{number.value} {worker.pid}"], check=True)  # not from its parent
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def _work() -> None:
    leave_signals_to_parent()
    time.sleep(60)


@pytest.mark.parametrize(
    ("rank", "error", "counted"), [(0, Interrupted, False), (0, ValueError, True), (1, Interrupted, True)]
)
def test_an_interrupted_reference_pass_is_progress_and_a_failed_one_is_not(
    tmp_path: Path, rank: int, error: type[Exception], counted: bool
) -> None:
    """Only rank 0 keeps the count."""
    count = RestartCount(tmp_path)
    count.start(0, 3)
    guard = RunGuard(TrainConfig(output_dir=str(tmp_path)), Ranks(rank, 2, rank), clean_leftovers)
    with pytest.raises(error), guard.progress_if_interrupted():
        raise error("x")
    assert count.path.exists() == counted


@pytest.mark.parametrize(
    ("error", "step_begun", "counted"),
    [(CheckpointError, False, False), (KeyError, False, True), (CheckpointError, True, True)],
)
def test_a_refused_start_is_not_counted_as_one_without_progress(
    tmp_path: Path, error: type[Exception], step_begun: bool, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpo.job.guard.from_rank_0", lambda make: make())
    config = TrainConfig(output_dir=str(tmp_path), resume=True, hang_timeout_seconds=0.0)
    for _ in range(2):  # the second finds the count of the first
        with pytest.raises(error), RunGuard(config, Ranks(), clean_leftovers) as guard:
            guard.count_restart(4)
            if step_begun:
                guard.at_step(4)
            raise error("the data differs")
    restarts = tmp_path / "restarts.json"
    assert (json.loads(restarts.read_text())["restarts"] if restarts.exists() else 0) == (2 if counted else 0)


def test_a_rank_slower_than_the_timeout_of_collectives_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpo.job.guard.from_rank_0", lambda make: make())
    config = TrainConfig(output_dir=str(tmp_path), hang_timeout_seconds=5.0)
    told = r"a collective timed out.*DEEPSPEED_TIMEOUT.*rank 1 on .*furthest behind: .*then measuring the groups"
    with pytest.raises(RankLostError, match=told), RunGuard(config, Ranks(0, 2, 0), clean_leftovers) as guard:
        slow = Watchdog(tmp_path, 1, 2, 1.0, guard.watchdog.own.run, end=lambda code: None)
        slow.moving = False
        for dog in (slow, guard.watchdog, guard.watchdog):
            dog.beat("measuring the groups")
        guard.watchdog.interval_s = 0.2
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    slow.stop()
