"""The srun behaviour that the scripts rely on, and deepspeed's srun launcher."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import PrivateCluster

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.mark.parametrize(("kill", "code"), [("0", 75), ("1", 143)])
def test_ranks_that_leave_one_after_the_other_end_with_their_own_code(
    cluster: PrivateCluster, kill: str, code: int
) -> None:
    """With --kill-on-bad-exit=1 the first task to exit gets the other killed, and no requeue would happen."""
    program = ["bash", "-c", "sleep $((SLURM_PROCID * 2)); exit 75"]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", f"--kill-on-bad-exit={kill}", "--wait=60", *program]
    result = subprocess.run(srun, env=cluster.environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == code, result.stderr


@pytest.mark.parametrize("path", ["../my clone/slurm/command.sh", "{clone}/slurm/command.sh"])
def test_sbatch_runs_the_files_of_the_script_s_own_clone(cluster: PrivateCluster, tmp_path: Path, path: str) -> None:
    """Slurm runs a copy of the script, in a folder that may itself look like a clone."""
    clone, here = tmp_path / "my clone", tmp_path / "here"
    shutil.copytree(ROOT / "slurm", clone / "slurm")
    (clone / "slurm" / "site.env").write_text("echo own code; exit 0\n")
    (here / "slurm").mkdir(parents=True)
    (here / "slurm" / "job.sh").write_text("echo foreign code; exit 0\n")
    options = ["--parsable", "--cpus-per-task=1", "--time=1", "--output", str(tmp_path / "log")]
    submitted = ["sbatch", *options, path.format(clone=clone), "merge", "--config", "a b.yaml"]
    job = subprocess.run(submitted, cwd=here, env=cluster.environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    cluster.wait_for(job.stdout.strip(), {"COMPLETED", "FAILED"}, 240)
    assert (tmp_path / "log").read_text() == "own code\n"


def test_deepspeed_starts_ranks_by_srun(cluster: PrivateCluster, tmp_path: Path) -> None:
    """It sets neither RANK nor MASTER_ADDR: SLURM's variables must do."""
    (tmp_path / "hosts").write_text("".join(f"{node} slots=1\n" for node in cluster.nodes))
    worker = ROOT / "tests" / "launch_worker.py"
    (tmp_path / "job.sh").write_text(
        "#!/usr/bin/env bash\n"
        f'export DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo PATH="{BIN}:$PATH"\n'
        f'deepspeed --launcher slurm --no_ssh_check --master_addr unused --hostfile "{tmp_path}/hosts" '
        f'"{worker}" "{tmp_path}" plain\n'
    )
    options = ["--nodes=2", "--ntasks-per-node=1", "--output", str(tmp_path / "log")]
    job = cluster.run("sbatch", "--parsable", *options, str(tmp_path / "job.sh"))
    state = cluster.wait_for(job, {"COMPLETED", "FAILED"}, 240)
    assert state == "COMPLETED", (tmp_path / "log").read_text()[-3000:]
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]
    assert [(rank["rank"], rank["world_size"], rank["sum"]) for rank in ranks] == [(0, 2, 3.0), (1, 2, 3.0)]
    assert {rank["master"] for rank in ranks} == {"127.0.0.2"}
