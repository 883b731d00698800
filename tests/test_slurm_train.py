"""slurm/train.sh with stand-ins for srun and scontrol. Run: python -m pytest tests/test_slurm_train.py"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >srun.args
env >srun.env
"""
# Answers only if the node list arrives as one word, as it does when it is quoted.
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames gpu[1-2]" ]] && printf 'gpu1\\ngpu2\\n'
"""


@pytest.fixture
def job(tmp_path: Path, repo_root: Path) -> Path:
    """The root of a clone, with a file in it that an unquoted `gpu[1-2]` would expand to."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "gpu1").touch()
    shutil.copy(repo_root / "slurm" / "train.sh", tmp_path / "spooled_copy")  # sbatch runs a copy from elsewhere
    return tmp_path


def submit(job: Path, *arguments: str, **slurm: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "PATH": f"{job / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(job),
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "8",
    }
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        ["bash", str(job / "spooled_copy"), *arguments],
        cwd="/",
        env={**environ, **variables, **slurm},
        capture_output=True,
        text=True,
        timeout=30,
    )


def srun_environment(job: Path) -> dict[str, str]:
    lines = (job / "srun.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_starts_one_program_per_task_and_tells_it_the_first_host(job: Path) -> None:
    result = submit(job, "--config", "my runs/a.yaml")
    assert result.returncode == 0, result.stderr
    arguments = (job / "srun.args").read_text().splitlines()
    assert arguments[-5:] == ["python", "-m", "bpo.train", "--config", "my runs/a.yaml"]
    environ = srun_environment(job)
    assert environ["MASTER_ADDR"] == "gpu1"
    assert environ["PYTHONSAFEPATH"] == "1"
    assert environ["OMP_NUM_THREADS"] == environ["SRUN_CPUS_PER_TASK"] == "8"


def test_requeued_job_resumes_and_a_first_start_does_not(job: Path) -> None:
    submit(job, "--config", "a.yaml")
    assert "--train.resume" not in (job / "srun.args").read_text()
    submit(job, "--config", "a.yaml", SLURM_RESTART_COUNT="1")
    assert (job / "srun.args").read_text().splitlines()[-2:] == ["--train.resume", "true"]


def test_site_settings_reach_the_tasks(job: Path) -> None:
    (job / "slurm" / "site.env").write_text("export NCCL_SOCKET_IFNAME=ib0${NEVER_SET}\n")
    assert submit(job, "--config", "a.yaml").returncode == 0
    assert srun_environment(job)["NCCL_SOCKET_IFNAME"] == "ib0"


def test_outside_of_slurm_it_says_how_to_start(job: Path) -> None:
    result = submit(job, SLURM_JOB_ID="")
    assert result.returncode == 2 and "sbatch slurm/train.sh" in result.stderr


def test_an_interrupted_run_is_requeued_and_a_failed_one_is_not(job: Path) -> None:
    scontrol = job / "bin" / "scontrol"
    scontrol.write_text(SCONTROL + '[[ "$1" == requeue ]] && echo "$2" >"$SLURM_SUBMIT_DIR/requeued"\ntrue\n')
    for code, requeued in ((1, False), (75, True)):
        (job / "bin" / "srun").write_text(f"{SRUN}exit {code}\n")
        assert submit(job, "--config", "a.yaml").returncode == code
        assert (job / "requeued").exists() == requeued
    assert (job / "requeued").read_text() == "7\n"
