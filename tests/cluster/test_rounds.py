"""Two rounds on a real Slurm as a chain of jobs, undisturbed and with jobs requeued in the middle of their work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from bpo.formats.files import read_groups
from tests.cluster.slurm_cluster import PrivateCluster
from tests.cluster.test_cluster import log, script, steps, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

JOBS = [
    *("r1-generate", "r1-generate-merge", "r1-judge", "r1-select", "r1-train", "r1-export"),
    *("r2-generate", "r2-generate-merge", "r2-select", "r2-train", "r2-export"),
]
FOLDERS = ("my rounds", "again")
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}

# A source and a loss that leave time to interrupt them, and a judge.
PLUGIN = """\
import time

from torch.nn.functional import softplus

from bpo.bootstrap.plugin import ImageAnswers, register_source
from bpo.losses.plugin import register_loss
from bpo.ranking.judge import Scored, register_judge


class SlowAnswers(ImageAnswers):
    def outcomes(self, batch, prepared):
        for outcome in super().outcomes(batch, prepared):
            time.sleep(0.4)
            yield outcome


@register_source("slow", completion_type="mllm-slow", provenance="slow")
def slow(config, generator, candidate):
    return SlowAnswers("slow", config, generator, candidate)


@register_loss("slow_sigmoid")
def slow_sigmoid(values):
    time.sleep(0.4)
    return softplus(-values.delta_P)


@register_judge("letters")
class Letters:
    passes = ("scores",)

    def __init__(self, config, ranks):
        pass

    def identity(self):
        return {}

    def judge(self, name, groups):
        for index, group in enumerate(groups):
            yield index, Scored(tuple(float(len(set(answer.response))) for answer in group.completions))

    def combine(self, results):
        return results["scores"]
"""
CONFIG = """\
model: {path: base model, dtype: float32}
data: {annotations: annotations.json, image_root: images, num_workers: 0}
bootstrap:
  plugin: rounds_plugin.py
  sources: [slow, regenerate]
  limit: 8
  batch_size: 2
  weaken: {max_new_tokens: 3, temperature: 1.0}  # a random model: more would have control characters
  validate: {same_language: false, require_real_change: false}
rank: {judge: letters, plugin: rounds_plugin.py, batch_size: 2}
select: {rule: all}
lora: {r: 4, alpha: 8, dropout: 0.1}
loss: {type: slow_sigmoid, plugin: rounds_plugin.py}
train: {epochs: 3, groups_per_step: 4, lr: 1.0e-2, tensorboard: false}
rounds: {each: [{}, {options: {rank: {judge: ""}}}]}
"""


def submit(home: Path, cluster: PrivateCluster, folder: str) -> dict[str, str]:
    """The jobs of a new chain by name."""
    options = ["--nodes=1", "--time=10", "--", "--config", "rounds.yaml", "--rounds.output_dir", folder]
    return dict(line.split(": ") for line in script(home, cluster, "rounds.sh", *options).splitlines())


def requeue(cluster: PrivateCluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: cluster.restarts(job) == 1, 60, f"the requeue of job {job}")


def begun_shards(folder: Path) -> list[int]:
    """Tasks of a round's generation that have written answers."""
    parts = (folder / "candidates.jsonl.parts").glob("rank-*.jsonl")
    return [int(part.stem.removeprefix("rank-")) for part in parts if part.stat().st_size]


def answers(file: Path) -> list[Any]:
    """All groups of a file, without the names of models, which are paths."""
    return [
        (group.id, [(answer.response, answer.type, answer.score) for answer in group.completions])
        for group in read_groups(file)
    ]


def policies(file: Path) -> set[str]:
    """The fingerprints of the models that generated the answers of a file."""
    found = [answer.provenance for group in read_groups(file) for answer in group.completions]
    return {provenance.policy for provenance in found if provenance and provenance.policy}


def weights(policy: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(policy.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    return found


def test_rounds_with_requeued_jobs_end_with_the_results_of_the_undisturbed_ones(
    cluster: PrivateCluster, home: Path
) -> None:
    (home / "rounds_plugin.py").write_text(PLUGIN)
    (home / "rounds.yaml").write_text(CONFIG)
    undisturbed, disturbed = (submit(home, cluster, folder) for folder in FOLDERS)
    assert list(disturbed) == JOBS

    again = home / "again"
    wait_until(lambda: len(steps(again / "round-1" / "run")) >= 2, 400, "two steps of round 1")
    requeue(cluster, disturbed["r1-train"])
    wait_until(lambda: begun_shards(again / "round-2"), 400, "an answer in round 2")
    requeue(cluster, f"{disturbed['r2-generate']}_{begun_shards(again / 'round-2')[0]}")

    for jobs in (undisturbed, disturbed):
        for name, job in jobs.items():
            assert cluster.wait_for(job, ENDS, 400) == "COMPLETED", f"{name}:\n{log(home, job)[-3000:]}"
    train, generate = (log(home, disturbed[name]) for name in ("r1-train", "r2-generate"))
    assert "restart 1" in train and re.search(r"continuing from .*: [1-5] steps are done", train)
    assert "restart 1" in generate and "SIGTERM: stopping at the next boundary" in generate
    losses = [[(s["step"], s["loss"]) for s in steps(home / folder / "round-1" / "run")] for folder in FOLDERS]
    assert losses[0] == losses[1]
    fingerprints: set[str] = set()
    for number in (1, 2):
        ours, theirs = (home / folder / f"round-{number}" for folder in FOLDERS)
        for file in ("candidates.jsonl", "groups.jsonl"):
            assert answers(ours / file) == answers(theirs / file)
        assert weights(ours / "policy") == weights(theirs / "policy")
        of_rounds = [policies(home / folder / f"round-{number}" / "candidates.jsonl") for folder in FOLDERS]
        assert len(of_rounds[0]) == 1 and of_rounds[0] == of_rounds[1]
        fingerprints |= of_rounds[0]
    assert len(fingerprints) == 2  # each round's answers are those of its own policy
    nothing = script(home, cluster, "rounds.sh", "--config", "rounds.yaml", "--rounds.output_dir", "again")
    assert "all rounds are finished" in nothing
