"""Stages in processes of their own: codes, signals, and no process that outlives the rounds."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bpo.rounds import processes
from bpo.rounds.plan import plan_rounds
from bpo.rounds.processes import command_of, run_stage
from bpo.rounds.stages import Stage
from tests.rounds.jobs import rounds_config


class Stop:
    received = False


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    made = plan_rounds(rounds_config(tmp_path, [{}]))[0]
    made.folder.mkdir(parents=True)
    return made


def replace_command(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(processes, "command_of", lambda stage: [sys.executable, "-S", "-c", code])


def test_the_command_is_that_of_a_user(stage: Stage) -> None:
    assert command_of(stage) == [sys.executable, "-m", "bpo.cli", "bootstrap", "--config", str(stage.config_file)]


def test_every_process_knows_its_rank_and_the_first_failure_is_the_code(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_command(
        monkeypatch, "import os, sys; r = os.environ['RANK']; print(r, os.environ['WORLD_SIZE']); sys.exit(int(r) * 3)"
    )
    assert run_stage(stage, 2, None) == 3
    assert sorted(stage.log_file.read_text().split("\n"))[1:] == ["0 2", "1 2"]


def test_a_signal_is_passed_on_and_the_stage_may_end_in_order(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_command(
        monkeypatch,
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True)\n"
        "time.sleep(60)",
    )
    stop = Stop()
    threading.Thread(target=lambda: (_wait_for(stage.log_file, "up"), setattr(stop, "received", True))).start()
    assert run_stage(stage, 1, stop) == 75  # type: ignore[arg-type]


def test_a_killed_process_gives_the_code_of_a_shell(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_command(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert run_stage(stage, 1, None) == 128 + signal.SIGKILL


def test_a_stage_ends_with_the_rounds_however_they_end(stage: Stage, tmp_path: Path) -> None:
    program = tmp_path / "rounds.py"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom bpo.rounds import processes\n"
        "from bpo.rounds.stages import Stage\n"
        f"processes.command_of = lambda stage: [sys.executable, '-S', '-c', {child!r}]\n"
        f"processes.run_stage(Stage(1, 'generate', Path({str(stage.folder)!r}), {{}}), 1, None)\n"
    )
    parent = subprocess.Popen([sys.executable, str(program)])
    pid = int(_wait_for(stage.log_file, "\n"))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(pid)


def _wait_for(log: Path, text: str) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and text in log.read_text():
            return log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{log} has no {text!r}")


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
