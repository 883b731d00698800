"""Runs `deepspeed bpo/train.py` in a subprocess with a progress bar."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

import bpo
from bpo.config.training import Config
from bpo.job.run_record import save_config


class TrainingFailed(RuntimeError):
    """The launcher failed; the message contains the end of its log."""


def run_training(config: Config, *, num_ranks: int) -> None:
    """Trains with the deepspeed launcher and waits; output goes to OUTPUT_DIR/train.log.

    Raises:
        TrainingFailed: The launcher failed.
    """
    output = Path(config.train.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "requested.yaml")
    script = Path(bpo.__file__).resolve().parent / "train.py"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(num_ranks)]
    command = [*launcher, "--master_port", str(_free_port()), str(script), "--config", str(output / "requested.yaml")]
    with (output / "train.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
        )
        try:
            _follow(process, output / "metrics.jsonl", config.train.max_steps)
        finally:
            if process.poll() is None:  # interrupted; also ends the launcher's workers
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        tail = (output / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        raise TrainingFailed(f"{' '.join(command)} failed with status {process.returncode}:\n" + "\n".join(tail))


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    binaries = str(Path(sys.executable).parent)  # contains ninja, which compiles DeepSpeed's operations
    environment["PATH"] = binaries + os.pathsep + environment.get("PATH", "")
    return environment


def _follow(process: subprocess.Popen[bytes], metrics: Path, num_steps: int) -> None:
    with tqdm(total=num_steps, desc="training", unit="step") as bar:
        while process.poll() is None:
            time.sleep(0.5)
            _show(bar, metrics)
        _show(bar, metrics)


def _show(bar: tqdm, metrics: Path) -> None:  # type: ignore[type-arg]
    if metrics.exists():
        bar.update(metrics.read_bytes().count(b"\n") - bar.n)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
