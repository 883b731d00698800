"""How the parts of bpo that know of all ranks grow with their number, from 1 to 64 simulated ranks.

    python -m benchmarks.scale_ranks [--json benchmarks/results/scale-ranks.json]

Each figure is the CPU time of one rank among R, in one process: the plan and the shards are those of R ranks; the
collectives of `gather` are replaced by copies, so that the work of a rank is measured and the network is not; `claim`
is one worker that asks while R - 1 others hold a claim in the same folder. The exponent is the slope of log(time) over
log(R) from 4 ranks on, by least squares: 0 is constant, 1 grows with the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.queue import SourceQueue
from bpo.checkpoint.shards import KINDS, Fragment, Shard, ShardSet, shard_name
from bpo.data.schedule import plan_step
from bpo.job import collectives
from bpo.model.reference.store import ReferenceStore
from bpo_kernels.bench.measure import machine

RANKS = (1, 2, 4, 8, 16, 32, 64)
FINGERPRINT = {"model": "simulated"}
PARAMETERS = 512


def best_of(function: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds of the cheapest of some runs; the wall time of another process's turn does not count."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def plan(ranks: int, num_groups: int) -> float:
    """Plans one step, as every rank does for the steps of all ranks; the median length is 1,100 tokens."""
    draw = random.Random(0)
    tokens = [int(draw.lognormvariate(7.0, 0.4)) for _ in range(num_groups)]
    return best_of(lambda: plan_step(0, 0, list(range(num_groups)), tokens, ranks, 8192))


def gather(ranks: int) -> float:
    """`gather_from_ranks` of the measured lengths of 1,000 groups per rank."""
    item = [[n, 1100, 3] for n in range(1000)]

    def all_gather(outputs: list[torch.Tensor], given: torch.Tensor) -> None:
        for output in outputs:
            output.copy_(given)

    replaced = {
        "get_world_size": lambda: ranks,
        "get_rank": lambda: 0,
        "get_backend": lambda: "gloo",
        "all_gather": all_gather,
    }
    with mock.patch.multiple(torch.distributed, **replaced):
        return best_of(lambda: collectives.gather_from_ranks(item))


class _Batches:
    """Batches without outcomes."""

    size, num_records = 8, 4096

    def __len__(self) -> int:
        return self.num_records

    def digests(self, number: int) -> list[str]:
        return [str(number)]


class _NoOutcomes:
    def has(self, source: str, digest: str) -> bool:
        return False

    def poll(self) -> None:
        """Nothing is ever finished."""


@contextlib.contextmanager
def workers(folder: Path, count: int) -> Iterator[list[Leases]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Leases(folder, f"worker{n}", timeout_s=600)) for n in range(count)]


def claim(ranks: int) -> float:
    """Seconds per claim of a worker, in a folder on the local disk."""
    with tempfile.TemporaryDirectory() as folder, workers(Path(folder), ranks) as leases:
        queues = [SourceQueue("inject", cast(Any, _Batches()), cast(Any, _NoOutcomes())) for _ in leases]
        held = [next(queue.leased(own)) for queue, own in zip(queues[1:], leases[1:], strict=True)]
        assert len({batch.number for batch in held}) == ranks - 1

        def once() -> None:
            queue = SourceQueue("inject", cast(Any, _Batches()), cast(Any, _NoOutcomes()))
            batch = next(queue.leased(leases[0]))
            leases[0].release(str(batch.ends))

        return best_of(once)


def write_store(folder: Path, ranks: int, entries_per_rank: int) -> None:
    for rank in range(ranks):
        store = ReferenceStore(folder, FINGERPRINT, rank)
        for number in range(entries_per_rank):
            store.put(hashlib.sha256(f"{rank} {number}".encode()).hexdigest(), torch.zeros(4))
        store.close()


def open_store(ranks: int, entries_per_rank: int) -> float:
    """Reads the index of the shards of all ranks, as every rank does after the reference pass."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), ranks, entries_per_rank)
        return best_of(lambda: ReferenceStore(Path(folder), FINGERPRINT), 3)


def resume(ranks: int) -> float:
    """Reads the tables of all shards of a checkpoint of 512 parameters, as every rank of a resumed run does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(ranks):
            own = range(rank * PARAMETERS // ranks, (rank + 1) * PARAMETERS // ranks)
            fragments = [Fragment(f"layer.{p}", (64,), "float32", 0, 64, 0, 64 * n) for n, p in enumerate(own)]
            flats = {f"{kind}.0": torch.zeros(64 * len(own)) for kind in KINDS}
            Shard(fragments, 1, flats).write(folder / shard_name(rank))
        files = [shard_name(rank) for rank in range(ranks)]
        return best_of(lambda: ShardSet(folder, files), 3)


PARTS: dict[str, Callable[[int], float]] = {
    "plan, 8 groups per rank": lambda ranks: plan(ranks, 8 * ranks),
    "plan, 512 groups": lambda ranks: plan(ranks, 512),
    "gather, 1,000 groups per rank": gather,
    "claim of a worker": claim,
    "open store, 500 entries per rank": lambda ranks: open_store(ranks, 500),
    "open store, 16,384 entries": lambda ranks: open_store(ranks, 16384 // ranks),
    "tables of a checkpoint": resume,
}


def exponent(seconds: dict[int, float]) -> float:
    """Slope of log(seconds) over log(ranks) by least squares, from 4 ranks on."""
    points = [(math.log(ranks), math.log(time_s)) for ranks, time_s in seconds.items() if ranks >= 4]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, measure in PARTS.items():
        seconds = {ranks: measure(ranks) for ranks in RANKS}
        rows.append({"part": name, "seconds": seconds, "exponent": round(exponent(seconds), 2)})
        times = " ".join(f"{1000 * seconds[ranks]:9.2f}" for ranks in RANKS)
        print(f"{name:34s} {times} ms  exponent {rows[-1]['exponent']:5.2f}", flush=True)
    largest = {f"{groups} groups per rank": plan(1024, groups * 1024) for groups in (1, 8)}
    print(f"plan of one step of 1,024 ranks: {largest}")
    if options.json:
        tree = {
            "command": " ".join(["python -m benchmarks.scale_ranks", *sys.argv[1:]]),
            "machine": machine(torch.device("cpu")),
            "ranks": RANKS,
            "rows": rows,
            "plan_of_1024_ranks_s": largest,
        }
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
