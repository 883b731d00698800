"""Ranks without DeepSpeed that save real checkpoints over gloo, and helpers to write and read such checkpoints.

The parameter `w` has 1000 elements, split among the ranks; after step s its master weights are s, s + 1, s + 2, ...
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bpo.checkpoint.files import Hook, no_hook
from bpo.checkpoint.save import CheckpointSaver
from bpo.checkpoint.shards import KINDS, MASTER, Fragment, Shard, ShardSet
from bpo.job.collectives import Alone, Collectives

NUMEL = 1000


def whole(step: int, kind: str = MASTER) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) * (1 + KINDS.index(kind)) + step


def make_shard(step: int, rank: int = 0, world_size: int = 1, padding: int = 3) -> Shard:
    """The part of a rank, with padding before and after it, as under ZeRO."""
    start, end = NUMEL * rank // world_size, NUMEL * (rank + 1) // world_size
    fragment = Fragment("w", (10, NUMEL // 10), "bfloat16", start, end - start, 0, padding)
    blank = torch.full((padding,), -1.0)
    tensors = {f"{kind}.0": torch.cat([blank, whole(step, kind)[start:end], blank]) for kind in KINDS}
    return Shard([fragment], step, tensors)


def stored_step(directory: Path, manifest: dict[str, Any]) -> int:
    """The step whose state a checkpoint contains; fails if the values are of no step or of several."""
    shards = ShardSet(directory, list(manifest["files"]))
    for kind in KINDS:
        torch.testing.assert_close(shards.read(kind, "w", 0, NUMEL), whole(shards.optimizer_step, kind), rtol=0, atol=0)
    return shards.optimizer_step


class Run:
    """A run whose state is its step number."""

    def __init__(self, output_dir: Path, job: Collectives | None = None, at_stage: Hook = no_hook, **options: Any):
        self.job = job or Alone()
        self.state = make_shard(0, self.job.rank, self.job.world_size)
        self.saver = CheckpointSaver(
            output_dir,
            self.job,
            lambda: dataclasses.replace(self.state),
            lambda step: {"step": step, "world_size": self.job.world_size, "config": {}},
            at_stage=at_stage,
            **options,
        )

    def to(self, step: int, *, due: bool = True, stop: bool = False, best: bool = False) -> bool:
        new = make_shard(step, self.job.rank, self.job.world_size)
        self.state.optimizer_step = step
        for name, tensor in new.tensors.items():  # in place, as an optimizer does
            self.state.tensors[name].copy_(tensor)
        return self.saver.boundary(step, due=due, stop=stop, best=best)

    def save(self, step: int) -> None:
        self.to(step)
        self.saver.finish(step)


class Gloo:
    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def sum(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, item: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item)
        return gathered


def warm_context() -> multiprocessing.context.ForkServerContext:
    """Starts processes without importing torch again: forked from a thread-free server that has imported it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpoint_worker", "soak"])
    # The server searches PYTHONPATH only for modules to preload, and ignores missing ones.
    here = Path(__file__).resolve().parent
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def save_and_die(rank: int, output_dir: str, stage: str, victim: int) -> None:
    """Two ranks save step 10, then step 20, in which `victim` is killed at `stage`; logs are kept."""
    torch.set_num_threads(1)
    log = logging.FileHandler(Path(output_dir) / f"log.{rank}")
    logging.basicConfig(level=logging.INFO, handlers=[log])
    dist.init_process_group("gloo", init_method=f"file://{output_dir}/rendezvous", rank=rank, world_size=2)
    armed = False

    def kill(now: str) -> None:
        if armed and now == stage and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    run = Run(Path(output_dir), Gloo(), kill, keep_last=1)
    run.save(10)
    armed = True
    run.save(20)
    dist.barrier()
