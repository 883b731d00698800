"""Parts of the GPU set as processes: none outlives its time, and a killed one leaves no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_set import process
from benchmarks.gpu_set.process import Caches, opened_caches, run_process

# Ignores SIGTERM and leaves two children, of which one has left its process group; writes their ids.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
children = [subprocess.Popen([sys.executable, "-c", code], start_new_session=own) for own in (False, True)]
open(sys.argv[1], "w").write(" ".join(str(child.pid) for child in children))
print("under way", flush=True)
time.sleep(float(sys.argv[2]))
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter: it ended while it was read
        return False


def children_of(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()]


@pytest.mark.parametrize(("sleeps", "status"), [("60", "stopped"), ("0", "passed")])
def test_a_part_ends_in_time_with_all_that_it_started(tmp_path: Path, sleeps: str, status: str) -> None:
    begin = time.monotonic()
    ended = run_process([sys.executable, "-c", STUBBORN, str(tmp_path / "ids"), sleeps], 3.0, {})
    assert ended.status == status and "under way" in ended.output_tail
    assert time.monotonic() - begin < 3.0 + process.TERM_SECONDS + 30.0  # its children would sleep for 60
    assert len(children_of(tmp_path / "ids")) == 2
    assert not [pid for pid in children_of(tmp_path / "ids") if is_running(pid)]


def test_a_part_ends_as_its_process_does() -> None:
    assert run_process([sys.executable, "-c", "print(1)"], 60.0, {}).status == "passed"
    failed = run_process([sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60.0, {})
    assert failed.status == "failed" and failed.output_tail == "why\n"
    shown = run_process([sys.executable, "-c", "import os; print(os.environ['A_WORD'])"], 60.0, {"A_WORD": "given"})
    assert shown.output_tail == "given\n"


def test_a_run_that_is_told_to_end_takes_its_part_along(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom benchmarks import gpu\nimport signal\nfrom benchmarks.gpu_set.process import run_process\n"
        "signal.signal(signal.SIGTERM, gpu._terminate)\n"
        "run_process([sys.executable, '-c', sys.argv[1], sys.argv[2], '60'], 60.0, {})"
    )
    environment = os.environ | {"PYTHONPATH": str(process.ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code, STUBBORN, str(tmp_path / "ids")], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ids").exists() or not (tmp_path / "ids").read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(120) == 128 + signal.SIGTERM
    assert not [pid for pid in children_of(tmp_path / "ids") if is_running(pid)]


def test_locks_of_killed_compilations_are_removed(tmp_path: Path) -> None:
    caches = Caches(tmp_path / "extensions", tmp_path / "inductor")
    built = caches.extensions / "py312_cpu" / "deepspeed_shm_comm"
    built.mkdir(parents=True)
    (built / "lock").touch()
    (built / "deepspeed_shm_comm.so").touch()
    assert caches.remove_locks() == [built / "lock"]
    assert [path.name for path in built.iterdir()] == ["deepspeed_shm_comm.so"]
    assert caches.environment()["TORCH_EXTENSIONS_DIR"] == str(caches.extensions)


def test_two_runs_at_once_share_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the locks of one would be removed by the other; one after the other they share what was compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "shared"))
    with opened_caches(tmp_path / "first") as first:
        assert first.extensions.is_relative_to(tmp_path / "shared")
        lock = first.extensions / "op" / "lock"
        lock.parent.mkdir()
        lock.touch()
        with opened_caches(tmp_path / "second") as second:
            assert second.extensions.is_relative_to(tmp_path / "second") and lock.exists()
    with opened_caches(tmp_path / "third") as third:
        assert third.extensions == first.extensions and not lock.exists()
