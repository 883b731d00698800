"""`bpo plan --scale`: one model from 1 to 1,024 GPUs, and which DeepSpeed file is the fastest at each size.

Computed from the formulas of docs/sizing.md, not measured. Latency of collectives is not modelled.

Letters: P parameters, T trained parameters, N ranks, b bytes per weight, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bpo.config.training import Config
from bpo.model.reference.format import RECORD
from bpo.tools.plan.candidates import Sizing, Traced, size_candidates
from bpo.tools.plan.group import GroupShape
from bpo.tools.plan.memory import GB
from bpo.tools.plan.speed import Machine

# Groups of an epoch if none are given.
NUM_GROUPS = 100_000
MOST_GPUS = 1024
# Time to plan one group, from benchmarks/results/scale-ranks.json: every rank plans the steps of all ranks.
PLAN_SECONDS_PER_GROUP = 1e-5


@dataclass(frozen=True)
class Storage:
    """Bandwidths of the shared file system, in GB/s: of the whole system, and of one rank's stream."""

    total_gb_s: float = 10.0
    rank_gb_s: float = 1.0

    def seconds(self, num_bytes: float, ranks: int) -> float:
        """Time to read or write `num_bytes` in equal parts by all ranks at once."""
        return num_bytes / (min(self.total_gb_s, ranks * self.rank_gb_s) * GB)


@dataclass(frozen=True)
class ScaleRow:
    """Figures at one number of GPUs; those of a step are 0 and the file empty if nothing fits.

    Attributes:
        wins: The fastest DeepSpeed file that fits, with its recomputation.
        compute, communication, step: Seconds per step; communication that overlaps is counted in the second only.
        groups_per_s: Throughput.
        plan: Seconds per step to plan it, once, before the first step, on every rank.
        reference_hours: The reference pass over all groups.
        store_gb, store_write_s, store_open_s: Reference store: its size; writing it; reading its index on every rank.
        checkpoint_gb, checkpoint_s: Weights and moments of all ranks, and the time to write them.
    """

    gpus: int
    nodes: int
    groups_per_step: int
    wins: str
    seconds_of_files: dict[str, float]
    compute: float
    communication: float
    step: float
    groups_per_s: float
    plan: float
    reference_hours: float
    store_gb: float
    store_write_s: float
    store_open_s: float
    checkpoint_gb: float
    checkpoint_s: float


def machines(largest: Machine) -> list[Machine]:
    """The machine with 1 to 1,024 GPUs: parts of a node, then 1, 2, 4, ... whole nodes."""
    per_node = largest.gpus_per_node
    parts = [(1, 2**k) for k in range(10) if 2**k < per_node]
    whole = [(2**k, per_node) for k in range(11) if 2**k * per_node <= MOST_GPUS]
    return [replace(largest, nodes=nodes, gpus_per_node=gpus) for nodes, gpus in (*parts, *whole)]


def scale(
    traced: Traced,
    config: Config,
    machine: Machine,
    memory: tuple[float, float],
    group: GroupShape,
    num_groups: int,
    groups_per_rank: int,
    storage: Storage,
    couples_groups: bool,
) -> list[ScaleRow]:
    """Sizes the model on `machine` with other numbers of GPUs.

    Args:
        memory: Bytes per GPU, and of host memory per node with all its GPUs.
        num_groups: G, of the reference pass and its store.
        groups_per_rank: Groups per step and rank, at every size.
    """
    rows = []
    for one in machines(machine):
        host = memory[1] * one.gpus_per_node / machine.gpus_per_node
        groups = groups_per_rank * one.world_size
        sizing = size_candidates(traced, config, one, memory[0], host, group, groups, couples_groups=couples_groups)
        rows.append(_row(sizing, one, num_groups, storage))
    return rows


def _row(sizing: Sizing, machine: Machine, num_groups: int, storage: Storage) -> ScaleRow:
    ranks, best = machine.world_size, None if sizing.best is None else sizing.candidates[sizing.best]
    time = None if best is None else best.time
    reference = sizing.group.reference
    index = 0.0 if reference is None else float(num_groups * RECORD.itemsize)
    # fp32 per response token and second target.
    tokens = 0.0 if reference is None else reference.work(1).responses + reference.second_targets
    store = index + 4.0 * num_groups * tokens
    checkpoint = 12.0 * sizing.shape.num_trained
    return ScaleRow(
        gpus=ranks,
        nodes=machine.nodes,
        groups_per_step=sizing.groups_per_step,
        wins="" if best is None else f"{best.ds_config} {best.checkpointing}",
        seconds_of_files={c.ds_config: c.time.total for c in sizing.candidates if c.time and c.fits_host},
        compute=time.compute if time else 0.0,
        communication=time.communication if time else 0.0,
        step=time.total if time else 0.0,
        groups_per_s=0.0 if best is None else sizing.groups_per_second(best),
        plan=PLAN_SECONDS_PER_GROUP * sizing.groups_per_step,
        reference_hours=sizing.reference_seconds(num_groups) / 3600,
        store_gb=store / GB,
        store_write_s=storage.seconds(store, ranks),
        # Every rank reads the whole index; values are mapped, and read for a rank's own groups.
        store_open_s=storage.seconds(index * ranks, ranks),
        checkpoint_gb=checkpoint / GB,
        checkpoint_s=storage.seconds(checkpoint, ranks),
    )


def render(rows: list[ScaleRow], num_groups: int) -> list[str]:
    """The table, and where another file becomes the fastest."""
    lines = [
        "",
        f"scale, {rows[0].groups_per_step // rows[0].gpus} groups per GPU and step, {num_groups:,} groups in all; "
        "computed, not measured",
        f"{'GPUs':>5s} {'fastest file that fits':24s}{'comp. s':>8s}{'comm. s':>8s}{'step s':>7s}{'groups/s':>9s}"
        f"{'plan s':>7s}{'ref. h':>8s}{'store GB':>9s}{'write s':>8s}{'open s':>7s}{'ckpt GB':>8s}{'save s':>7s}",
    ]
    for row in rows:
        lines.append(
            f"{row.gpus:5d} {row.wins or 'nothing fits':24s}{row.compute:8.2f}{row.communication:8.2f}{row.step:7.2f}"
            f"{row.groups_per_s:9.2f}{row.plan:7.3f}{row.reference_hours:8.2f}{row.store_gb:9.2f}{row.store_write_s:8.2f}"
            f"{row.store_open_s:7.2f}{row.checkpoint_gb:8.1f}{row.checkpoint_s:7.1f}"
        )
    return [*lines, *_changes(rows)]


def _changes(rows: list[ScaleRow]) -> list[str]:
    """At which size each file becomes the fastest, with the step time of the file that it replaces."""
    lines, before = [], None
    for row in rows:
        name = row.wins.partition(" ")[0]
        if name and before is not None and name != before:
            other = row.seconds_of_files.get(before)
            instead = f"; {before} would take {other:.2f} s" if other else f"; {before} does not fit"
            lines.append(f"from {row.gpus} GPUs, nodes: {row.nodes}, {name}: {row.step:.2f} s per step{instead}")
        elif name and before is None:
            lines.append(f"GPUs: {row.gpus}, {name}: {row.step:.2f} s per step")
        before = name or before
    return lines
