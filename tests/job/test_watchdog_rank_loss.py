"""A rank is killed, another is frozen; each time the job ends on its own and resumes from a valid state.

Two ranks of bpo.train without a launcher, as srun starts them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import BIN, write_groups
from tiny import tiny_llava
from train_matrix import base_config

from bpo.checkpoint.files import newest_valid_checkpoint
from bpo.job.exits import EXIT_INTERRUPTED, EXIT_NO_PROGRESS, EXIT_RANK_LOST, read_status
from bpo.job.run_record import save_config

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 10.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Job:
    """Both ranks, with their output in files."""

    def __init__(self, root: Path, name: str, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.logs = [root / f"{name}.{rank}.log" for rank in (0, 1)]
        self.started_s = time.time()
        self.ranks = []
        for rank, log in enumerate(self.logs):
            environment = {
                **os.environ,
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "DS_ACCELERATOR": "cpu",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            command = [sys.executable, "-m", "bpo.train", "--config", str(root / "config.yaml"), *options]
            with log.open("w") as file:
                self.ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))

    def wait_for_step(self, metrics: Path, step: int) -> None:
        """Waits until this job has written the step; the previous job may have gone past its last checkpoint."""
        deadline = time.monotonic() + 200
        while not (
            metrics.exists()
            and metrics.stat().st_mtime > self.started_s
            and f'{{"step": {step},' in metrics.read_text()
        ):
            assert time.monotonic() < deadline and self.ranks[0].poll() is None, self.text(0)[-3000:]
            time.sleep(0.05)

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loss")
    write_groups(root)
    tiny_llava(root / "llava")
    config = base_config(root, "run", "zero3", epochs=500, save_every_steps=2, hang_timeout_seconds=TIMEOUT_S)
    save_config(config, root / "config.yaml")
    return root


def test_killed_then_frozen_then_stopped(root: Path) -> None:
    metrics, checkpoints = root / "run" / "metrics.jsonl", root / "run" / "checkpoints"
    job = Job(root, "killed")
    try:
        job.wait_for_step(metrics, 6)
        status = read_status(root / "run")
        assert (status["state"], status["pid"], status["exit_code"]) == ("running", job.ranks[0].pid, None)
        job.ranks[1].send_signal(signal.SIGKILL)
        ended = time.monotonic()
        assert job.ranks[0].wait(60) == EXIT_RANK_LOST, job.text(0)[-3000:]
        assert time.monotonic() - ended < 30
    finally:
        job.kill()
    (line,) = {text.split("ends here: ")[1] for text in job.text(0).splitlines() if "the job ends here" in text}
    assert line.startswith(f"rank 1 on {os.uname().nodename} (process {job.ranks[1].pid}) died; last finished step ")
    status = read_status(root / "run")
    assert (status["exit_code"], line in status["message"]) == (EXIT_RANK_LOST, True)

    found = newest_valid_checkpoint(root / "run")
    assert found is not None and found[1]["step"] >= 4
    job = Job(root, "frozen", "--resume")
    try:
        job.wait_for_step(metrics, found[1]["step"] + 5)
        job.ranks[0].send_signal(signal.SIGSTOP)  # the one that usually writes the status
        frozen = time.monotonic()
        assert job.ranks[1].wait(60) == EXIT_RANK_LOST, job.text(1)[-3000:]
        assert TIMEOUT_S - 1 < time.monotonic() - frozen < TIMEOUT_S + 20
    finally:
        job.kill()
    assert f"continuing from {checkpoints}" in job.text(0)
    ends = [line for line in job.text(1).splitlines() if "the job ends here" in line]
    assert ends and all(f"rank 0 on {os.uname().nodename} (process {job.ranks[0].pid})" in line for line in ends)
    assert all("last finished step" in line for line in ends)
    status = read_status(root / "run")
    assert (status["exit_code"], status["pid"]) == (EXIT_RANK_LOST, job.ranks[1].pid)

    job = Job(root, "stopped", "--resume")
    found = newest_valid_checkpoint(root / "run")
    assert found is not None
    try:
        job.wait_for_step(metrics, found[1]["step"] + 3)
        for process in job.ranks:  # a closed terminal, then its session's manager
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in job.ranks] == [EXIT_INTERRUPTED] * 2, job.text(0)[-3000:]
    finally:
        job.kill()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1))
    assert newest_valid_checkpoint(root / "run")[1]["step"] == steps[-1]  # type: ignore[index]
    status = read_status(root / "run")
    assert status["exit_code"] == EXIT_INTERRUPTED and "--resume" in status["message"]


def test_restarts_in_vain_end_with_their_own_code(root: Path, tmp_path: Path) -> None:
    """Found before a model is loaded: one process is enough to test it."""
    output = tmp_path / "none"
    output.mkdir()
    (output / "restarts.json").write_text(json.dumps({"step": 0, "restarts": 3}))
    command = [sys.executable, "-m", "bpo.train", "--config", str(root / "config.yaml")]
    command += ["--resume", "--train.output_dir", str(output)]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == EXIT_NO_PROGRESS, result.stderr[-3000:]
    assert "3 restarts since the checkpoint of step 0 have made no progress" in result.stderr
    assert read_status(output)["exit_code"] == EXIT_NO_PROGRESS
