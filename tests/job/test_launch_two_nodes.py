"""Two nodes under torchrun and deepspeed, simulated on one machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WORKER = str(ROOT / "tests" / "launch_worker.py")

# Both hosts are this machine. pdsh is real: it numbers the nodes.
SSH = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do
    case "$1" in -o | -p | -l) shift ;; esac
    shift
done
echo "$1" >>"$SSH_LOG"
shift
exec bash -c "$*"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    ours = {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return {**environ, **ours, **more}


def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two agents, as two nodes would have; the second waits for nothing but the first one's address."""
    shared = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command = [str(BIN / "torchrun"), *shared]
    agents = [
        subprocess.Popen([*command, f"--node_rank={node}", WORKER, str(tmp_path), "a b"], env=environment())
        for node in (1, 0)
    ]
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    ranks = found(tmp_path)
    assert [(r["rank"], r["world_size"], r["local_rank"], r["sum"]) for r in ranks] == [(0, 2, 0, 3.0), (1, 2, 0, 3.0)]
    assert all(rank["arguments"] == ["a b"] for rank in ranks)


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh (Debian: apt install pdsh)")
def test_deepspeed_on_two_nodes_of_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    result = subprocess.run(
        [str(BIN / "deepspeed"), *options, WORKER, str(tmp_path), "a b"],
        env=environment(PATH=f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}", SSH_LOG=str(tmp_path / "ssh.log")),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"127.0.0.2", "127.0.0.3"} <= set((tmp_path / "ssh.log").read_text().split())
    ranks = found(tmp_path)
    assert [(r["rank"], r["world_size"], r["local_rank"], r["sum"]) for r in ranks] == [(0, 2, 0, 3.0), (1, 2, 0, 3.0)]
    assert all(rank["arguments"] == ["a b"] for rank in ranks)  # --local_rank, which it adds, is not ours
