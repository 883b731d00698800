"""Process identity: start times, recycled ids, other hosts."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bpo.job.process import is_running, prepare_for_workers, process_start, this_process


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_processes_are_told_apart() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid()) != process_start(1)
    assert process_start(ended_pid()) is None


def test_a_process_runs_until_it_has_ended() -> None:
    here = this_process()
    assert is_running(here) is True
    assert is_running(here._replace(pid=ended_pid(), started=None)) is False
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = here._replace(pid=child.pid, started=process_start(child.pid))
        assert is_running(identity) is True
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_running(identity) is False  # a zombie: killed, not yet waited for


def test_a_recycled_pid_is_not_the_process() -> None:
    assert is_running(this_process()._replace(started="1")) is False
    assert is_running(this_process()._replace(started=None)) is True  # start time unknown: the id decides


def test_nothing_is_known_of_other_hosts_boots_and_namespaces() -> None:
    boot = this_process().boot
    for elsewhere in ({"host": "n7"}, {"boot": "other"}, {"boot": ""}, {"boot": boot.replace("pid:[", "pid:[9")}):
        assert is_running(this_process()._replace(**elsewhere)) is None


def test_nothing_is_known_of_processes_that_proc_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as mounted with hidepid=2
    monkeypatch.setattr("bpo.job.process.process_start", lambda pid: None)
    assert is_running(this_process()._replace(pid=1)) is None
    assert is_running(this_process()._replace(pid=ended_pid())) is False


def test_a_proc_of_another_namespace_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    here = this_process()
    monkeypatch.setattr(os, "readlink", lambda path: "4711")  # such as that of the host in a container
    assert this_process().boot == "" and is_running(here) is None


def test_limits_that_are_too_low_for_data_workers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (64, 64)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.update(now=new))
    prepare_for_workers(0, 2)
    with pytest.raises(ValueError, match="data.num_workers 2 needs 128 open files, the limit is 64.*ulimit -n 128"):
        prepare_for_workers(2, 2)
    limits["now"] = (64, 4096)  # the process may raise it itself
    prepare_for_workers(2, 2)
    assert limits["now"] == (128, 4096)

    def semaphore() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing, "Semaphore", semaphore)
    with pytest.raises(ValueError, match="/dev/shm has too little .*--shm-size.*data.num_workers to 0"):
        prepare_for_workers(2, 2)
