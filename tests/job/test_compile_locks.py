"""Locks left by killed compilations, with torch's own loader and with a training run started as users do."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from torch.utils.cpp_extension import load
from torch.utils.file_baton import FileBaton

from bpo import engine
from bpo.bootstrap import run as bootstrap
from bpo.config.training import Config, EvaluationConfig
from bpo.evaluation import run as evaluation
from bpo.job import compile_locks
from bpo.job.compile_locks import StaleCompileLockError, extensions_root, find_locks, inspect_lock, named_compile_locks
from bpo.job.launch import Ranks
from bpo.tools import doctor

LONG_AGO_S = 3600.0

# Takes the lock as torch does, prints a line, and holds it until its standard input closes.
HOLDER = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
sys.stdin.read()
baton.release()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_locks, "CHECK_EVERY_S", 0.3)
    monkeypatch.setattr(compile_locks, "NAME_AFTER_S", 0.6)


@pytest.fixture
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A live process that compiles `cpu_adam`, as far as its lock tells."""
    (root / "cpu_adam").mkdir()
    command = [sys.executable, "-c", HOLDER, str(root / "cpu_adam" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def leave_lock(root: Path, name: str = "cpu_adam", idle_s: float = 0.0) -> Path:
    """What a compilation leaves that was killed `idle_s` ago."""
    lock = root / name / "lock"
    lock.parent.mkdir(exist_ok=True)
    for path in (lock, lock.with_name("build.ninja")):
        path.touch()
        os.utime(path, (time.time() - idle_s,) * 2)
    return lock


def test_stale_lock_ends_a_real_load_with_its_path_and_the_fix(root: Path, quick: None) -> None:
    lock = leave_lock(root, "tiny", LONG_AGO_S)
    source = root / "tiny.cpp"
    source.write_text("#include <torch/extension.h>\n")
    with named_compile_locks(), pytest.raises(StaleCompileLockError, match=f"rm {lock}$"):
        load("tiny", [str(source)])
    assert lock.exists()  # only the user knows whether another machine compiles


def test_young_lock_is_named_once_and_waited_for(
    root: Path, quick: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = leave_lock(root)
    monkeypatch.setattr(compile_locks, "STALE_AFTER_S", 2.5)
    with caplog.at_level(logging.INFO), named_compile_locks(), pytest.raises(StaleCompileLockError):
        FileBaton(str(lock)).wait()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(lock) in record.message and "Another machine" in record.message and f"rm {lock}" in record.message


def test_live_compilation_is_waited_for_however_long_it_takes(
    holder: subprocess.Popen[str], root: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    lock = leave_lock(root, idle_s=LONG_AGO_S)
    assert [found.state for found in find_locks(root)] == ["held"]
    assert holder.stdin is not None

    def release_and_go_on(record: logging.LogRecord) -> bool:
        holder.stdin.close()  # type: ignore[union-attr]
        return True

    logging.getLogger("bpo.job.compile_locks").addFilter(release_and_go_on)
    try:
        with caplog.at_level(logging.INFO), named_compile_locks():
            FileBaton(str(lock)).wait()
    finally:
        logging.getLogger("bpo.job.compile_locks").removeFilter(release_and_go_on)
    [record] = caplog.records
    assert (
        record.levelno == logging.WARNING and f"process {holder.pid} " in record.message and "rm " not in record.message
    )
    assert not lock.exists()


def test_killed_holder_leaves_a_lock_that_is_possible_then_stale(
    holder: subprocess.Popen[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = root / "cpu_adam" / "lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    found = inspect_lock(lock)
    assert found is not None and found.holder is None and found.state == "possible"
    monkeypatch.setattr(compile_locks, "STALE_AFTER_S", 0.0)
    assert found.state == "stale"
    leave_lock(root, idle_s=LONG_AGO_S)
    (lock.parent / "cpu_adam.o").touch()  # some compiler is running: not stale after all
    monkeypatch.undo()
    assert inspect_lock(lock).state == "possible"  # type: ignore[union-attr]


def test_only_the_first_rank_of_a_node_reports_and_all_of_them_raise(
    root: Path, quick: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_locks, "STALE_AFTER_S", 1.5)
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with named_compile_locks(), pytest.raises(StaleCompileLockError):
        FileBaton(str(leave_lock(root))).wait()
    assert not caplog.records


def test_torch_waits_as_before_outside_of_the_context() -> None:
    before = FileBaton.wait
    with named_compile_locks():
        assert FileBaton.wait is not before
    assert FileBaton.wait is before


def test_directory_is_the_one_that_torch_uses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    assert Path(_get_build_directory("cpu_adam", False)).parent == extensions_root()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    directory = Path(_get_build_directory("cpu_adam", False))
    assert [lock.path for lock in find_locks(extensions_root())] == []
    lock = leave_lock(directory.parent)
    assert [found.path for found in find_locks(extensions_root())] == [lock]


def build_from(lock: Path) -> Callable[..., None]:
    """Stands for any function that builds the operation of `lock`."""

    def build(*args: Any, **options: Any) -> None:
        FileBaton(str(lock)).wait()

    return build


@pytest.mark.parametrize(
    ("module", "called_first", "command"),
    [
        (engine, "export_torch_environment", lambda: engine.init_distributed(Ranks())),
        (engine, "parameter_groups", lambda: engine.TrainingEngine(Mock(), Mock(), Config(), {}, Ranks())),
        (bootstrap, "_check_paths", lambda: bootstrap.run_bootstrap(Config())),
        (
            evaluation,
            "read_suite",
            lambda: evaluation.run_evaluation(Config(evaluation=EvaluationConfig(output="o.json"))),
        ),
    ],
    ids=["process group", "engine", "bootstrap", "evaluate"],
)
def test_whatever_is_built_inside_these_is_covered(
    module: Any, called_first: str, command: Callable[[], Any], root: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = leave_lock(root, idle_s=LONG_AGO_S)
    monkeypatch.setattr(module, called_first, build_from(lock))
    with pytest.raises(StaleCompileLockError, match=f"rm {lock}"):
        command()


def test_doctor_lists_each_lock_with_its_fix(holder: subprocess.Popen[str], root: Path) -> None:
    stale, young = leave_lock(root, "stale_op", LONG_AGO_S), leave_lock(root, "young_op")
    held, stale_finding, young_finding = doctor.check_compile_locks()
    assert (held.status, held.detail) == ("ok", str(root / "cpu_adam" / "lock"))
    assert (stale_finding.status, stale_finding.detail) == ("missing", str(stale))
    assert f"rm {stale}" in stale_finding.consequence
    assert (young_finding.status, young_finding.detail) == ("warn", str(young))
    for lock in (stale, young):
        lock.unlink()
    holder.communicate()
    assert [found.status for found in doctor.check_compile_locks()] == ["ok"]


def start_training(tmp_path: Path, root: Path) -> subprocess.Popen[str]:
    output = tmp_path / "run"
    output.mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "groups.jsonl").touch()
    options = ["--model.path", str(tmp_path / "model"), "--data.groups", str(tmp_path / "groups.jsonl")]
    options += ["--train.output_dir", str(output)]
    return subprocess.Popen(
        [sys.executable, "-m", "bpo.cli", "train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(root)},
    )


@pytest.mark.slow
def test_training_ends_at_a_stale_lock(tmp_path: Path) -> None:
    root = tmp_path / "extensions"
    root.mkdir()
    lock = leave_lock(root, "deepspeed_shm_comm", LONG_AGO_S)
    with start_training(tmp_path, root) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["exit_code"] == 1 and status["message"].endswith(f"rm {lock}")
    assert status["message"] in output and "Traceback" not in output


@pytest.mark.slow
def test_training_names_a_young_lock_within_30_seconds_of_waiting(tmp_path: Path) -> None:
    root = tmp_path / "extensions"
    root.mkdir()
    lock = leave_lock(root, "deepspeed_shm_comm")
    with start_training(tmp_path, root) as process:
        assert process.stdout is not None
        started = time.monotonic()
        line = next(line for line in process.stdout if str(lock) in line)
        # The imports before it take up to a minute on a busy machine.
        assert time.monotonic() - started < 90 and "waiting" in line and f"rm {lock}" in line
        process.kill()
    assert compile_locks.NAME_AFTER_S + compile_locks.CHECK_EVERY_S <= 30
