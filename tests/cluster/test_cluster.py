"""The scripts of slurm/ on a real Slurm: two nodes on loopback, a tiny model.

The whole chain runs once, undisturbed. Then the same training is disturbed: a rank is killed, the job is preempted and
comes back; its losses must be those of the chain. Meanwhile a bootstrapping job of another user of the same nodes
reaches its time limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bpo.formats.files import read_groups
from bpo.job.watchdog import heartbeat_path
from tests.bootstrap.fake_server import completion, fake_server
from tests.cluster.conftest import NUM_IMAGES, NUM_STEPS
from tests.cluster.slurm_cluster import PrivateCluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

CHAIN = ("bootstrap", "merge", "train", "export", "evaluate")


def script(home: Path, cluster: PrivateCluster, name: str, *arguments: str) -> str:
    """Runs a command as a user types it; returns its output, usually a job id."""
    command = [str(home / "clone" / "slurm" / name), *arguments]
    result = subprocess.run(command, cwd=home, env=cluster.environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def log(home: Path, job: str) -> str:
    return "".join(path.read_text() for path in sorted(home.glob(f"slurm-*-{job}*.out")))


def steps(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)


def server_flags(url: str) -> list[str]:
    """One request at a time: batches of eight, so that shards and signals fall between them."""
    server = {"url": url, "model": "m", "concurrency": "1"}
    return [word for name, value in server.items() for word in (f"--bootstrap.inject.server.{name}", value)]


def changed(body: dict[str, Any], number: int) -> Any:
    """A rewriting that the validators accept."""
    return completion(f"Picture 0: a blue boat and {number + 20} white houses by a quiet lake.")


@dataclass(frozen=True)
class Limited:
    """A bootstrapping job whose server takes a second per answer, so that it reaches its time limit."""

    array: str
    merge: str
    requests: list[dict[str, Any]]


@pytest.fixture(scope="module")
def limited(cluster: PrivateCluster, home: Path) -> Iterator[Limited]:
    """Submitted first, because it only waits: it is over by the time its test runs."""
    first = json.loads((home / "annotations.json").read_text())[0]
    records = [{**first, "id": f"a{number:03d}"} for number in range(96)]
    (home / "many.json").write_text(json.dumps(records))
    jobs: list[str] = []

    def answer(body: dict[str, Any], number: int) -> Any:
        # Slow until the first start has reached its limit of two minutes; the second one finishes.
        time.sleep(0.0 if jobs and cluster.restarts(jobs[0]) else 1.0)
        return changed(body, number)

    with fake_server(answer) as (url, requests):
        job = script(
            home,
            cluster,
            "bootstrap.sh",
            *("--array=0", "--time=2", "--signal=USR2@60", "--nodelist=127.0.0.2", "--"),
            *("--config", "run.yaml", "--data.annotations", "many.json", "--data.groups", "limited/groups.jsonl"),
            *("--bootstrap.sources", '["inject"]', *server_flags(url)),
        )
        array, merge = re.fullmatch(r"bootstrap (\d+), merge (\d+)", job).groups()  # type: ignore[union-attr]
        jobs.append(array)
        yield Limited(array, merge, requests)


@pytest.fixture(scope="module")
def chain(cluster: PrivateCluster, home: Path, limited: Limited) -> dict[str, str]:
    """The jobs of one uninterrupted pipeline, after it has ended."""
    with fake_server(changed) as (url, _):
        options = ["--time=10", "--", "--config", "run.yaml", *server_flags(url)]
        printed = script(home, cluster, "pipeline.sh", "my results", *options)
        jobs = dict(zip(CHAIN, re.findall(r"\d+", printed.split(";")[0]), strict=True))
        for name, job in jobs.items():
            state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, 300)
            assert state == "COMPLETED", f"{name}: {state}\n{log(home, job)[-3000:]}"
    return jobs


def test_pipeline_goes_from_annotations_to_metrics(home: Path, chain: dict[str, str]) -> None:
    folder = home / "my results"
    groups = read_groups(folder / "groups.jsonl")
    assert [group.id for group in groups] == [f"r{number:02d}" for number in range(NUM_IMAGES)]
    assert len(steps(folder / "run")) == NUM_STEPS
    assert (folder / "model" / "config.json").is_file()
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert {"chair/chair_i", "pope/accuracy"} <= metrics.keys()


def test_array_and_evaluation_were_shared(home: Path, chain: dict[str, str]) -> None:
    parts = sorted((home / "my results" / "groups.jsonl.parts").glob("rank-*.jsonl"))
    assert [path.name for path in parts] == ["rank-00000.jsonl", "rank-00001.jsonl"]
    # The first to start does more; nothing is done twice.
    assert sum(len(path.read_text().splitlines()) for path in parts) == 2 * NUM_IMAGES
    assert "2 tasks on: 127.0.0.2 127.0.0.3" in log(home, chain["evaluate"])


def test_training_ran_on_both_nodes_under_zero_3(home: Path, chain: dict[str, str]) -> None:
    text = log(home, chain["train"])
    assert "restart 0, 2 tasks on: 127.0.0.2 127.0.0.3" in text and "ended with code 0" in text
    (newest,) = {
        path.parent for path in (home / "my results" / "run" / "checkpoints").rglob(f"step-*{NUM_STEPS}/manifest.json")
    }
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["config"]["train"]["ds_config"].endswith("zero3.json")
    plugin = hashlib.sha256((home / "my_loss.py").read_bytes()).hexdigest()
    assert manifest["fingerprints"]["plugin"] == plugin  # found in the submission directory


def train_again(home: Path, cluster: PrivateCluster, *more: str) -> str:
    data = ("--config", "run.yaml", "--data.groups", "my results/groups.jsonl", "--train.output_dir", "again")
    return script(home, cluster, "train.sh", "--time=10", "--", *data, *more)


def wait_for_step(home: Path, number: int) -> None:
    wait_until(lambda: len(steps(home / "again")) >= number, 240, f"step {number}")


def test_killed_and_preempted_training_ends_with_the_losses_of_the_unbroken_one(
    cluster: PrivateCluster, home: Path, chain: dict[str, str]
) -> None:
    job = train_again(home, cluster)
    wait_for_step(home, 5)
    victim = json.loads(heartbeat_path(home / "again", 1).read_text())["pid"]
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert (
        cluster.wait_for(job, {"FAILED", "COMPLETED", "PENDING"}, 240) == "FAILED"
    )  # lost before it could be requeued
    assert time.monotonic() - killed_at < 60
    text = log(home, job)
    blame = rf"the job ends here: rank 1 on \S+ \(process {victim}\) died; last finished step \d+"
    assert len(re.findall(blame, text)) == 1, text[-3000:]
    assert "a task was lost" in text

    before = len(steps(home / "again"))
    job = train_again(home, cluster, "--train.resume", "true")
    wait_until(lambda: len(steps(home / "again")) > before, 240, "the resumed training")
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodelist=127.0.0.3", "--cpus-per-task=4", "--wrap=sleep 1"),
        *("--output", str(home / "urgent.out")),
    )
    assert cluster.wait_for(urgent, {"COMPLETED"}, 240)
    assert cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, 240) == "COMPLETED", log(home, job)[-3000:]
    text = log(home, job)
    assert cluster.restarts(job) == 1 and "restart 0" in text and "restart 1" in text  # one log
    assert "SIGTERM: stopping at the next boundary" in text and "stopped by a signal, results so far are kept" in text
    again, unbroken = steps(home / "again"), steps(home / "my results" / "run")
    assert [(s["step"], s["loss"], s["grad_norm"]) for s in again] == [
        (s["step"], s["loss"], s["grad_norm"]) for s in unbroken
    ]


def test_bootstrapping_goes_on_after_its_time_limit(cluster: PrivateCluster, home: Path, limited: Limited) -> None:
    assert cluster.wait_for(limited.merge, {"COMPLETED", "FAILED", "CANCELLED"}, 240) == "COMPLETED"
    text = log(home, limited.array)
    assert cluster.restarts(limited.array) == 1, text
    assert "SIGUSR2: stopping at the next boundary" in text and "ended with code 75" in text
    kept = re.search(r"(\d+) of 96 records of source `inject` are done", text)
    assert kept and int(kept.group(1)) % 8 == 0
    # Only records that a validator rejected were requested twice: the second start did only the others.
    answered = len((home / "limited" / "groups.jsonl.parts" / "rank-00000.jsonl").read_text().splitlines())
    assert answered == 96 and len(limited.requests) == 96


def test_a_cancelled_job_stays_cancelled(cluster: PrivateCluster, home: Path) -> None:
    """Its tasks get SIGTERM as from a preemption, and stop with code 75; it must not be requeued then."""
    with fake_server(lambda body, number: (time.sleep(30), completion("x"))[1]) as (url, requests):
        job = script(
            home,
            cluster,
            "bootstrap.sh",
            *("--array=0", "--", "--config", "run.yaml", "--data.groups", "cancelled/groups.jsonl"),
            *("--bootstrap.sources", '["inject"]', *server_flags(url)),
        )
        array, merge = re.fullmatch(r"bootstrap (\d+), merge (\d+)", job).groups()  # type: ignore[union-attr]
        wait_until(lambda: requests, 240, "the first request")
        cluster.run("scancel", array)
        cluster.wait_for(array, {"CANCELLED"}, 240)
        assert cluster.wait_for(merge, {"CANCELLED"}, 240)  # its dependency can never be satisfied
        assert cluster.restarts(array) == 0
