"""Kills a training run at random moments, restarts it each time, and compares it with the uninterrupted run.

python tests/soak.py [--kills 30] [--minutes N] [--seed 0]

A stripped trainer (one process, one weight vector, AdamW) on the real plan, reference store, lock, checkpoints and
metrics file. Some kills happen at a named stage of a save, some at any moment; between lives, a bit of the latest
checkpoint sometimes flips. At the end, losses and groups of every step must equal those of the uninterrupted run, bit
for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
import torch._dynamo  # imported by every optimizer: would cost seconds in each life
from checkpoint_worker import warm_context

from bpo.checkpoint.files import STAGES, checkpoint_dirs, clean_leftovers, newest_valid_checkpoint
from bpo.checkpoint.save import CheckpointSaver
from bpo.checkpoint.shards import Fragment, Shard, ShardSet, shard_name
from bpo.data.schedule import PlannedStep, plan_steps
from bpo.job.collectives import Alone
from bpo.job.lock import RunLock
from bpo.job.restarts import RestartCount
from bpo.job.watchdog import Watchdog
from bpo.model.reference.store import ReferenceStore
from bpo.training.metrics import MetricsWriter

NUM_GROUPS, GROUPS_PER_STEP, EPOCHS, SAVE_EVERY, WIDTH = 96, 4, 16, 3, 4096
DAMAGE_SHARE = 0.1
STEPS_PER_LIFE, STARTUP_S = 12, 0.25


@dataclass(frozen=True)
class Death:
    """When a life ends: at the n-th pass of a save stage, some time after n steps, or some time after the start."""

    stage: str = ""
    times: int = 0
    steps: int = 0
    delay_s: float = 0.0

    @classmethod
    def drawn(cls, draw: random.Random) -> Death:
        kind = draw.random()
        if kind < 0.4:
            return cls(stage=draw.choice(STAGES), times=draw.randrange(1, 5))
        if kind < 0.8:
            return cls(steps=draw.randrange(1, STEPS_PER_LIFE), delay_s=draw.uniform(0, 0.1))
        return cls(delay_s=draw.uniform(0, STARTUP_S))


class Trainer:
    """Learns a positive score for chosen - rejected features, relative to stored reference scores."""

    def __init__(self, output_dir: Path):
        generator = torch.Generator().manual_seed(1)
        self.features_GW = torch.randn(NUM_GROUPS, WIDTH, generator=generator)
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, generator=generator) * 0.1)
        self.adam = torch.optim.AdamW([self.weight], lr=1e-2)
        self.keys = [hashlib.sha256(f"group {g}".encode()).hexdigest() for g in range(NUM_GROUPS)]
        self.store = ReferenceStore(output_dir / "reference", {"weights": "of seed 1"})
        missing = [g for g, has in enumerate(self.store.has(self.keys).tolist()) if not has]
        with torch.no_grad():
            for g in missing:  # before a checkpoint is loaded: only the untrained policy is the reference
                self.store.put(self.keys[g], (self.features_GW[g] @ self.weight)[None])
        self.store.close()
        self.store.reload()

    def step(self, groups: tuple[int, ...]) -> float:
        reference_G = self.store.gather([self.keys[g] for g in groups])
        margin_G = self.features_GW[list(groups)] @ self.weight - reference_G
        loss = -torch.nn.functional.logsigmoid(margin_G).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return float(loss.detach())

    def shard(self) -> Shard:
        state = self.adam.state[self.weight]
        fragment = Fragment("weight", (WIDTH,), "float32", 0, WIDTH, 0, 0)
        tensors = {"master.0": self.weight.data, "exp_avg.0": state["exp_avg"], "exp_avg_sq.0": state["exp_avg_sq"]}
        return Shard([fragment], int(state["step"]), tensors)

    def restore(self, directory: Path, files: list[str]) -> None:
        shards = ShardSet(directory, files)
        moments = {kind: torch.zeros(WIDTH) for kind in ("exp_avg", "exp_avg_sq")}
        self.adam.state[self.weight] = {"step": torch.tensor(float(shards.optimizer_step)), **moments}
        shard = self.shard()
        shards.fill(shard.fragments, shard.tensors)


def planned() -> list[PlannedStep]:
    lengths = [100 + 7 * (g % 13) for g in range(NUM_GROUPS)]
    options = {"groups_per_step": GROUPS_PER_STEP, "epochs": EPOCHS, "seed": 3, "world_size": 1, "max_tokens": 1000}
    return plan_steps(lengths, **options)  # type: ignore[arg-type]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(output: str, death: Death | None) -> None:
    """One life of the run: from the latest valid checkpoint to the end or to its death."""
    torch.set_num_threads(1)
    output_dir = Path(output)
    logging.basicConfig(level=logging.INFO, filename=output_dir.parent / f"{output_dir.name}.log")
    passed: list[str] = []
    if death is not None and not death.stage and not death.steps:
        threading.Timer(death.delay_s, die).start()

    def at_stage(now: str) -> None:
        passed.append(now)
        if death is not None and now == death.stage and passed.count(now) == death.times:
            die()

    lock = RunLock(output_dir)
    clean_leftovers(output_dir)
    watchdog = Watchdog(output_dir, 0, 1, 60.0)
    trainer, steps = Trainer(output_dir), planned()
    found = newest_valid_checkpoint(output_dir)
    done = 0
    if found is not None:
        done = int(found[1]["step"])
        trainer.restore(found[0], list(found[1]["files"]))
    restarts = RestartCount(output_dir)
    restarts.start(done, 0)
    writer = MetricsWriter(output_dir, enabled=True, start_step=done)
    saver = CheckpointSaver(
        output_dir,
        Alone(),
        trainer.shard,
        lambda step: {"step": step, "world_size": 1, "config": {}},
        keep_last=3,
        at_stage=at_stage,
    )
    for step in steps[done:]:
        if death is not None and death.steps and step.index == done + death.steps:
            threading.Timer(death.delay_s, die).start()
        if death is not None and step.index == done + STEPS_PER_LIFE:
            die()  # on a fast machine too, the run must not end before its last kill
        watchdog.beat("step", step.index)
        loss = trainer.step(step.groups)
        writer.write(step.index + 1, {"loss": loss, "groups": list(step.groups)})  # type: ignore[dict-item]
        due = (step.index + 1) % SAVE_EVERY == 0 or step is steps[-1]
        saver.boundary(step.index + 1, due=due, stop=False)
    saver.finish(len(steps))
    writer.close()
    watchdog.stop()
    lock.release()
    restarts.clear()


@dataclass
class Soak:
    kills: int
    flipped_bits: int
    lives: int
    steps_before_last_kill: int
    final_loss: float


def history(output_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def flip_a_bit(output_dir: Path, draw: random.Random) -> bool:
    """Damages one file of the latest checkpoint if there is an older one to fall back to."""
    found = checkpoint_dirs(output_dir)
    if len(found) < 2:
        return False
    path = found[0] / draw.choice([shard_name(0), "manifest.json"])
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return True


def soak(root: Path, kills: int, seed: int) -> Soak:
    """Runs once uninterrupted and once with `kills` kills in `root`; raises AssertionError if they differ."""
    context, draw = warm_context(), random.Random(seed)
    results = Soak(0, 0, 0, 0, 0.0)
    for name in ("unbroken", "killed"):
        (root / name).mkdir(parents=True)
    unbroken = context.Process(target=run, args=(str(root / "unbroken"), None))
    unbroken.start()
    output_dir = root / "killed"
    while results.kills < kills:
        process = context.Process(target=run, args=(str(output_dir), Death.drawn(draw)))
        process.start()
        process.join()
        results.lives += 1
        assert process.exitcode == -signal.SIGKILL, f"the run ended ({process.exitcode}) after {results.kills} kills"
        results.kills += 1
        if draw.random() < DAMAGE_SHARE:
            results.flipped_bits += flip_a_bit(output_dir, draw)
    results.steps_before_last_kill = len((output_dir / "metrics.jsonl").read_text().splitlines())
    last = context.Process(target=run, args=(str(output_dir), None))
    last.start()
    for process in (unbroken, last):
        process.join()
        assert process.exitcode == 0, f"exit code {process.exitcode}; see {root}/*.log"
    expected, found = history(root / "unbroken"), history(output_dir)
    assert [line["step"] for line in found] == list(range(1, len(planned()) + 1))
    assert [line["groups"] for line in found] == [line["groups"] for line in expected]
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    results.lives += 1
    results.final_loss = float(str(found[-1]["loss"]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills in one run")
    parser.add_argument("--minutes", type=float, default=0.0, help="repeat with further seeds for this long")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the moments of the kills")
    options = parser.parse_args()
    deadline, seed = time.monotonic() + 60 * options.minutes, options.seed
    while True:
        root, started = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic()
        result = soak(root, options.kills, seed)
        shutil.rmtree(root)
        print(f"seed {seed}: {result}, equal to the unbroken run, {time.monotonic() - started:.1f} s", flush=True)
        seed += 1
        if time.monotonic() >= deadline:
            return


if __name__ == "__main__":
    main()
