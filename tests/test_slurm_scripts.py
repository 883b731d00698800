"""slurm/*.sh with fakes of Slurm's commands; tests/cluster runs them on a real cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >srun.args
env -0 >srun.env
exit "${SRUN_EXIT:-0}"
"""
# Answers only if the node list arrives as one word, as it does when it is quoted. COMMAND is what was submitted.
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show job 7") printf 'JobId=7 JobName=x\\n   Command=%s\\n   WorkDir=/\\n' "${COMMAND:?}" ;;
    "show hostnames gpu[1-2]") printf 'gpu1\\ngpu2\\n' ;;
    "requeue "*) echo "$2" >>"$SLURM_SUBMIT_DIR/requeued"; exit "${REQUEUE_EXIT:-0}" ;;
    *) exit 1 ;;
esac
"""
# Job numbers start at 11; one line per submission, arguments separated by `|`. Rejects what REFUSE names.
SBATCH = """#!/usr/bin/env bash
if [[ -n "${REFUSE:-}" && "$*" == *"$REFUSE"* ]]; then echo "sbatch: error: refused" >&2; exit 1; fi
printf '%s|' "$@" >>sbatch.args; echo "$BPO_ROOT" >>sbatch.args
echo "$((10 + $(wc -l <sbatch.args)));this-cluster"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$*" >>cancelled
"""
# One line per job in the queue: its id, folder and command.
SQUEUE = """#!/usr/bin/env bash
[[ ! -f queue ]] || cat queue
"""
# `bpo rounds --jobs`: prints the file `jobs`, or exits with BPO_EXIT.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" >python.args
cat jobs
exit "${BPO_EXIT:-0}"
"""
ROUND = [
    "r1-generate bootstrap.sh --config my_out/round-1/generate.yaml",
    "r1-generate-merge command.sh merge --config my_out/round-1/generate.yaml",
    "r1-judge rank.sh --config my_out/round-1/judge.yaml",
    "r1-select command.sh select --config my_out/round-1/select.yaml",
    "r1-train train.sh --config my_out/round-1/train.yaml",
]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The root of a clone whose path has a space, with a file in it that an unquoted `gpu[1-2]` would expand to."""
    root = tmp_path / "my clone"
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "bin").mkdir()
    (root / ".venv" / "bin").mkdir(parents=True)
    programs = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "scancel": SCANCEL, "squeue": SQUEUE}
    for name, text in {**{f"bin/{name}": text for name, text in programs.items()}, ".venv/bin/python": PYTHON}.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    (root / "gpu1").touch()
    return root


def run(script: Path, cwd: Path, clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("SLURM_", "SBATCH_", "BPO_", "OMP_NUM_THREADS", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environ["PATH"] = f"{clone / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env={**environ, **environment}, capture_output=True, text=True, timeout=300)


def in_job(clone: Path, script: str, *arguments: str, **slurm: str) -> subprocess.CompletedProcess[str]:
    """As sbatch runs it: a copy from another folder."""
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(clone),
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "8",
        "COMMAND": " ".join([str(clone / "slurm" / script), *arguments]),
    }
    copy = clone.parent / "spooled"
    shutil.copy(ROOT / "slurm" / script, copy)
    return run(copy, Path("/"), clone, *arguments, **{**variables, **slurm})


def array_task(number: int, first: int = 0, last: int = 3) -> dict[str, str]:
    return {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_STEP": "1",
        "SLURM_ARRAY_TASK_COUNT": str(last - first + 1),
    }


def srun_arguments(clone: Path) -> list[str]:
    return (clone / "srun.args").read_text().splitlines()


def srun_environment(clone: Path) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in (clone / "srun.env").read_text().split("\0") if "=" in entry)


def submissions(clone: Path) -> list[list[str]]:
    return [line.split("|") for line in (clone / "sbatch.args").read_text().splitlines()]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "slurm" / "site.env"], ids=lambda path: path.name)
def test_every_script_is_valid_and_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n passed")
    result = subprocess.run(["shellcheck", "-x", "-s", "bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_starts_one_program_per_task_and_tells_it_the_first_host(clone: Path) -> None:
    result = in_job(clone, "train.sh", "--config", "my runs/a.yaml", RANK="3", MASTER_ADDR="stale")
    assert result.returncode == 0, result.stderr
    assert srun_arguments(clone)[-5:] == ["python", "-m", "bpo.train", "--config", "my runs/a.yaml"]
    environ = srun_environment(clone)
    assert environ["MASTER_ADDR"] == "gpu1" and "RANK" not in environ
    assert environ["PYTHONSAFEPATH"] == "1"
    assert environ["OMP_NUM_THREADS"] == environ["SRUN_CPUS_PER_TASK"] == "8"


def test_no_rank_is_killed_because_another_left_first(clone: Path) -> None:
    in_job(clone, "train.sh", "--config", "a.yaml")
    assert {"--kill-on-bad-exit=0", "--wait=120"} <= set(srun_arguments(clone))


def test_requeued_job_resumes_and_a_first_start_does_not(clone: Path) -> None:
    in_job(clone, "train.sh", "--config", "a.yaml")
    assert "--train.resume" not in srun_arguments(clone)
    in_job(clone, "train.sh", "--config", "a.yaml", SLURM_RESTART_COUNT="1")
    assert srun_arguments(clone)[-2:] == ["--train.resume", "true"]


def test_site_settings_reach_the_tasks(clone: Path) -> None:
    (clone / "slurm" / "site.env").write_text("export NCCL_SOCKET_IFNAME=ib0${NEVER_SET}\nBPO_SRUN_ARGS=(--exact)\n")
    assert in_job(clone, "train.sh", "--config", "a.yaml").returncode == 0
    assert srun_environment(clone)["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "--exact" in srun_arguments(clone)


def test_the_shipped_site_file_changes_nothing(clone: Path) -> None:
    in_job(clone, "train.sh", "--config", "a.yaml")
    with_file = srun_arguments(clone)
    (clone / "slurm" / "site.env").unlink()
    in_job(clone, "train.sh", "--config", "a.yaml")
    assert srun_arguments(clone) == with_file


def test_containers(clone: Path) -> None:
    site = clone / "slurm" / "site.env"
    site.write_text(
        'BPO_CONTAINER=pyxis\nBPO_CONTAINER_IMAGE="/images/my bpo.sqsh"\nBPO_CONTAINER_MOUNTS=/data:/data\n'
    )
    assert in_job(clone, "train.sh", "--config", "a b.yaml").returncode == 0
    arguments = srun_arguments(clone)
    assert "--container-image=/images/my bpo.sqsh" in arguments and "--container-mounts=/data:/data" in arguments
    assert f"--container-workdir={clone}" in arguments and arguments[-5:][0] == "python"
    site.write_text('BPO_CONTAINER=apptainer\nBPO_CONTAINER_IMAGE="/my bpo.sif"\nBPO_CONTAINER_ARGS=(--rocm)\n')
    assert in_job(clone, "train.sh", "--config", "a b.yaml").returncode == 0
    container = [
        "apptainer",
        "exec",
        "--nv",
        "--pwd",
        str(clone),
        "--bind",
        f"{clone}:{clone}",
        "--rocm",
        "/my bpo.sif",
    ]
    assert srun_arguments(clone)[-14:] == [*container, "python", "-m", "bpo.train", "--config", "a b.yaml"]
    site.write_text("BPO_CONTAINER=docker\n")
    result = in_job(clone, "train.sh", "--config", "a.yaml")
    assert result.returncode == 2 and "none, pyxis or apptainer" in result.stderr


@pytest.mark.parametrize(
    ("code", "requeued", "says"),
    [
        (0, False, "finished"),
        (1, False, "failed"),
        (74, False, "cannot be written"),
        (75, True, "results so far are kept"),
        (93, False, "restarts make no progress"),
        (140, True, "before its signal handlers"),
        (76, False, "a task was lost"),
        (137, False, "a task was lost"),
    ],
)
def test_what_each_exit_code_becomes(clone: Path, code: int, requeued: bool, says: str) -> None:
    result = in_job(clone, "train.sh", "--config", "a.yaml", SRUN_EXIT=str(code))
    assert result.returncode == code
    assert (clone / "requeued").exists() == requeued
    assert f"job 7 ended with code {code}" in result.stdout and says in result.stdout


@pytest.mark.parametrize("code", ["76", "137"])
def test_a_task_lost_after_a_while_is_requeued(clone: Path, code: str) -> None:
    in_job(clone, "train.sh", "--config", "a.yaml", SRUN_EXIT=code, BPO_CRASH_REQUEUE_AFTER_S="0")
    assert (clone / "requeued").read_text() == "7\n"


def test_a_cluster_that_does_not_requeue_says_how_to_go_on(clone: Path) -> None:
    result = in_job(clone, "train.sh", "--config", "a.yaml", SRUN_EXIT="75", REQUEUE_EXIT="1")
    assert result.returncode == 75 and "submit it again (training: with --train.resume true)" in result.stderr


@pytest.mark.parametrize(
    ("command", "section"), [("bootstrap", "bootstrap"), ("rank", "rank"), ("evaluate", "evaluation")]
)
def test_a_task_of_an_array_is_a_shard_and_is_requeued_alone(clone: Path, command: str, section: str) -> None:
    result = in_job(clone, f"{command}.sh", "--config", "a.yaml", SRUN_EXIT="75", **array_task(5, first=4, last=7))
    assert result.returncode == 75
    program = ["python", "-m", "bpo.cli", command, "--config", "a.yaml"]
    shard = [f"--{section}.shard_index", "1", f"--{section}.num_shards", "4"]
    assert srun_arguments(clone)[-10:] == [*program, *shard]
    assert (clone / "requeued").read_text() == "7_5\n"


def test_an_array_with_gaps_is_refused(clone: Path) -> None:
    variables = {**array_task(9), "SLURM_ARRAY_TASK_COUNT": "2"}
    result = in_job(clone, "bootstrap.sh", "--config", "a.yaml", **variables)
    assert result.returncode == 2 and "a range such as 0-7" in result.stderr


@pytest.mark.parametrize("script", ["train.sh", "bootstrap.sh", "rank.sh", "evaluate.sh", "command.sh"])
def test_only_files_of_the_submitted_script_s_clone_are_run(clone: Path, script: str) -> None:
    """The folder from which it is submitted, or an inherited BPO_ROOT, may look like a clone."""
    other = clone.parent / "other"
    (other / "slurm").mkdir(parents=True)
    (other / "slurm" / "job.sh").write_text("echo foreign code; exit 3\n")
    inherited = {"SLURM_SUBMIT_DIR": str(other), "BPO_ROOT": str(other)}
    (clone / "slurm" / "site.env").write_text("echo own code\n")
    result = in_job(clone, script, "/slurm/train.sh", f"{other}/slurm/{script}", **inherited)
    assert "own code" in result.stdout and "foreign code" not in result.stdout, result.stderr
    result = run(clone / "slurm" / script, other, clone, **inherited)  # outside of a job
    assert "foreign code" not in result.stdout and submissions(other)[0][-1] == str(clone), result.stderr
    shutil.copy(clone / "slurm" / script, other / script)
    for elsewhere in (str(other / script), f"{script} {clone}/slurm/{script}"):
        result = in_job(clone, script, SLURM_SUBMIT_DIR=str(other), COMMAND=elsewhere)
        assert result.returncode == 2 and "set BPO_ROOT to CLONE" in result.stderr
    result = in_job(clone, script, SLURM_SUBMIT_DIR=str(other), COMMAND=str(other / script), BPO_ROOT=str(clone))
    assert "own code" in result.stdout  # a copy, and the user says of which clone


def test_outside_of_a_job_a_script_submits_itself_with_the_options_of_the_site(clone: Path, tmp_path: Path) -> None:
    site = "BPO_SBATCH_ARGS=(--account='my project')\nBPO_TRAIN_SBATCH_ARGS=(--nodes=2)\n"
    (clone / "slurm" / "site.env").write_text(site)
    here = tmp_path / "elsewhere"
    here.mkdir()
    result = run(clone / "slurm" / "train.sh", here, clone, "--nodes=4", "--", "--config", "my a.yaml")
    assert (result.returncode, result.stdout) == (0, "11\n"), result.stderr
    script = str(clone / "slurm" / "train.sh")
    options = ["--parsable", "--account=my project", "--nodes=2", "--nodes=4"]
    assert submissions(here) == [[*options, script, "--config", "my a.yaml", str(clone)]]


def test_bootstrap_submits_its_merge(clone: Path) -> None:
    (clone / "slurm" / "site.env").write_text("BPO_COMMAND_SBATCH_ARGS=(--partition=cpu)\n")
    result = run(clone / "slurm" / "bootstrap.sh", clone, clone, "--array=0-31", "--", "--config", "a.yaml")
    assert result.returncode == 0, result.stderr
    array, merge = submissions(clone)
    assert array[1:-1] == ["--array=0-31", str(clone / "slurm" / "bootstrap.sh"), "--config", "a.yaml"]
    after = ["--partition=cpu", "--dependency=afterok:11", "--kill-on-invalid-dep=yes"]
    assert merge[1:-1] == [*after, str(clone / "slurm" / "command.sh"), "merge", "--config", "a.yaml"]


def test_pipeline_chains_its_jobs_over_one_folder(clone: Path) -> None:
    arguments = ["my out", "--qos=x", "--", "--config", "a.yaml", "--", "--data.image_root", "val 2014"]
    result = run(clone / "slurm" / "pipeline.sh", clone, clone, *arguments)
    assert result.returncode == 0, result.stderr
    jobs = submissions(clone)
    assert [Path(next(a for a in job if a.endswith(".sh"))).name for job in jobs] == [
        f"{name}.sh" for name in ("bootstrap", "command", "train", "command", "evaluate")
    ]
    waits = [[argument for argument in job if argument.startswith("--dependency")] for job in jobs]
    assert waits == [[], *([f"--dependency=afterok:{number}"] for number in (11, 12, 13, 14))]
    assert all("--qos=x" in job for job in jobs) and all("my out/groups.jsonl" in job for job in jobs)
    assert jobs[4][-5:-1] == ["--data.image_root", "val 2014", "--model.path", "my out/model"]
    assert not any("val 2014" in job for job in jobs[:4])
    assert "11 12 13 14 15" in result.stdout and "my out/results.json" in result.stdout


def test_a_refused_stage_takes_the_chain_back(clone: Path) -> None:
    result = run(clone / "slurm" / "pipeline.sh", clone, clone, "out", "--config", "a.yaml", REFUSE="train.sh")
    assert result.returncode != 0 and "have been cancelled" in result.stderr
    assert (clone / "cancelled").read_text() == "11 12\n"
    assert run(clone / "slurm" / "pipeline.sh", clone, clone, "--config", "a.yaml").returncode == 2


def plan(clone: Path, jobs: list[str]) -> None:
    """What `bpo rounds --jobs` will print; `_` becomes a space."""
    (clone / "jobs").write_text("".join(job.replace(" ", "\t").replace("_", " ") + "\n" for job in jobs))


def rounds(clone: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(clone / "slurm" / "rounds.sh", clone, clone, *options, "--config", "my a.yaml", **environment)


def test_rounds_submits_the_jobs_that_bpo_lists_each_after_the_one_before(clone: Path) -> None:
    site = "BPO_SBATCH_ARGS=(--account=x)\nBPO_RANK_SBATCH_ARGS=(--array=0-3)\nBPO_TRAIN_SBATCH_ARGS=(--nodes=2)\n"
    (clone / "slurm" / "site.env").write_text(site)
    plan(clone, ROUND)
    result = rounds(clone, "--qos=y", "--time=9", "--")
    assert result.returncode == 0, result.stderr
    asked = (clone / "python.args").read_text().splitlines()
    assert asked == ["-m", "bpo.cli", "rounds", "--config", "my a.yaml", "--jobs"]
    own = {"rank.sh": ["--array=0-3"], "train.sh": ["--nodes=2"]}
    expected = []
    for number, line in enumerate(ROUND):
        name, script, *arguments = (field.replace("_", " ") for field in line.split(" "))
        after = [f"--dependency=afterok:{10 + number}", "--kill-on-invalid-dep=yes"] if number else []
        options = ["--account=x", *own.get(script, []), *after, f"--job-name={name}", "--qos=y", "--time=9"]
        expected.append(["--parsable", *options, str(clone / "slurm" / script), *arguments, str(clone)])
    assert submissions(clone) == expected
    assert result.stdout.splitlines()[-1] == "r1-train: 15" and not (clone / "cancelled").exists()


def test_rounds_takes_the_chain_back_if_a_job_is_refused(clone: Path) -> None:
    plan(clone, ROUND)
    result = rounds(clone, REFUSE="rank.sh")
    assert result.returncode != 0 and "have been cancelled" in result.stderr
    assert (clone / "cancelled").read_text() == "11 12\n"


def test_rounds_submits_nothing_if_all_is_finished_or_bpo_reports_an_error(clone: Path) -> None:
    plan(clone, [])
    result = rounds(clone)
    assert result.returncode == 0 and "all rounds are finished" in result.stdout
    plan(clone, ROUND)
    assert rounds(clone, BPO_EXIT="3").returncode == 3
    (clone / "jobs").write_text("usage: bpo rounds\n")
    result = rounds(clone)
    assert result.returncode == 2 and "instead of a job: usage: bpo rounds" in result.stderr
    assert not (clone / "sbatch.args").exists() and not (clone / "cancelled").exists()


def test_rounds_that_are_in_the_queue_are_not_submitted_again(clone: Path) -> None:
    plan(clone, ROUND)
    command = "slurm/train.sh --config my out/round-1/train.yaml"
    (clone / "queue").write_text(f"3 /elsewhere {command}\n4_[0-3] {clone} {command}\n")
    result = rounds(clone)
    assert result.returncode == 1 and "job 4_[0-3] of these rounds is in the queue" in result.stderr
    assert not (clone / "sbatch.args").exists()
    (clone / "queue").write_text(f"3 /elsewhere {command}\n4 {clone} {command.replace('my', 'own')}\n")
    assert rounds(clone).returncode == 0


def test_rounds_asks_bpo_in_the_site_s_container(clone: Path) -> None:
    """As jobs run it: pyxis needs a job for that, apptainer does not."""
    plan(clone, ROUND)
    site = clone / "slurm" / "site.env"
    site.write_text("BPO_CONTAINER=pyxis\nBPO_CONTAINER_IMAGE=/my.sqsh\nBPO_COMMAND_SBATCH_ARGS=(--partition=cpu)\n")
    assert rounds(clone).returncode == 0
    arguments = srun_arguments(clone)
    assert {"--partition=cpu", "--ntasks=1", "--output=all", "--container-image=/my.sqsh"} <= set(arguments)
    program = ["python", "-m", "bpo.cli", "rounds", "--config", "my a.yaml", "--jobs"]
    assert arguments[-7:] == program
    (clone / "bin" / "apptainer").write_text(PYTHON)
    (clone / "bin" / "apptainer").chmod(0o755)
    site.write_text("BPO_CONTAINER=apptainer\nBPO_CONTAINER_IMAGE=/my.sif\n")
    assert rounds(clone).returncode == 0
    assert (clone / "python.args").read_text().splitlines()[-8:] == ["/my.sif", *program]
