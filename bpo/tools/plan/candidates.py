"""Candidate settings (DeepSpeed file, tokens per micro-batch, recomputation): sizes each, recommends the fastest."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bpo.config.training import Config
from bpo.engine import find_ds_config, with_fitting_buckets
from bpo.tools.plan.activations import ActivationCosts, activation_costs
from bpo.tools.plan.group import GroupShape
from bpo.tools.plan.memory import GB, RankMemory, Zero, head_bytes, node_host_bytes, rank_memory
from bpo.tools.plan.shape import ModelShape, shape_of
from bpo.tools.plan.speed import Machine, StepTime, step_time

# From the least communication to the most offloading.
DS_CONFIGS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload", "zero3_nvme")
CHECKPOINTING = ("none", "selective", "full", "offload")
# Granularity and maximum of the tokens per micro-batch; larger micro-batches are not faster on GPUs.
_TOKEN_STEP, _MOST_TOKENS = 256, 32768


@dataclass(frozen=True)
class Candidate:
    """One DeepSpeed file with one kind of recomputation.

    Attributes:
        tokens: Largest micro-batch that fits, in packed tokens; 0 if not even one group fits.
        memory: Memory with that micro-batch, or with one group if none fits.
        host: Bytes of host memory per node.
        time: Step time; None if nothing fits.
    """

    ds_config: str
    zero: Zero
    checkpointing: str
    tokens: int
    memory: RankMemory
    host: float
    micro_batches: int
    time: StepTime | None
    fits_host: bool


@dataclass(frozen=True)
class Sizing:
    """The fastest fitting candidate for each DeepSpeed file, and the index of the recommended one.

    Attributes:
        couples_groups: Whether the activations of all micro-batches of a step wait for its first backward pass.
        reference_tokens: Micro-batch of the reference pass; 0 without one.
    """

    shape: ModelShape
    group: GroupShape
    machine: Machine
    groups_per_step: int
    candidates: tuple[Candidate, ...]
    best: int | None
    reference_tokens: int
    couples_groups: bool = False

    def groups_per_second(self, candidate: Candidate) -> float:
        return 0.0 if candidate.time is None else self.groups_per_step / candidate.time.total

    def reference_seconds(self, num_groups: float) -> float:
        """Time of the reference pass: one forward pass over `num_groups` groups, divided among the ranks."""
        if self.group.reference is None:
            return 0.0
        flops = self.shape.flops.forward(self.group.reference.work(1)) * num_groups
        device = self.machine.gpu.peak_tflops * 1e12 * self.machine.utilisation
        return flops / device / self.machine.world_size


@dataclass(frozen=True)
class Traced:
    """A model with its activation costs by kind of recomputation and by whether weights are gathered, traced once."""

    shape: ModelShape
    costs: Callable[[str, bool], ActivationCosts]


def trace(model: str, config: Config) -> Traced:
    """See `shape.shape_of`, which says what is raised."""
    shape = shape_of(model, config)
    return Traced(shape, functools.cache(lambda mode, gathers: activation_costs(shape, mode, gathers=gathers)))


def size_candidates(
    model: Traced,
    config: Config,
    machine: Machine,
    gpu_memory: float,
    host_memory: float,
    group: GroupShape,
    groups_per_step: int = 0,
    *,
    couples_groups: bool = False,
) -> Sizing:
    """Sizes every file in ds_configs/ for `model` on `machine`.

    Args:
        config: Configuration of the run: trained parts, adapter, dtype, groups per step, data workers.
        gpu_memory: Bytes per GPU.
        host_memory: Bytes per node.
        group: The average group as the loss packs it.
        groups_per_step: 0 uses the configuration's value, raised to one group per rank.
        couples_groups: `LossProgram.couples_groups`.
    """
    shape, costs = model.shape, model.costs
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    groups_per_step = groups_per_step or max(config.train.groups_per_step, machine.world_size)
    sizer = _Sizer(
        shape, machine, gpu_memory, host_memory, group, groups_per_step, dtype, config.data.num_workers, couples_groups
    )
    fastest = []
    for name in DS_CONFIGS:
        settings = json.loads(find_ds_config(f"ds_configs/{name}.json").read_text(encoding="utf-8"))
        settings = with_fitting_buckets(settings, shape.num_trained)
        zero = Zero.from_settings(settings, machine.nodes, machine.gpus_per_node)
        candidates = [sizer.candidate(name, zero, mode, costs(mode, zero.stage == 3)) for mode in CHECKPOINTING]
        fastest.append(min(candidates, key=_slowness))
    # Training refuses weights on NVMe, as DeepSpeed 0.19.8 does not run them: `checkpoint.partition.check_settings`.
    usable = [i for i, c in enumerate(fastest) if c.time is not None and c.fits_host and not c.zero.param_on_nvme]
    best = min(usable, key=lambda i: _slowness(fastest[i]), default=None)
    reference_tokens = 0
    if best is not None and group.reference is not None:
        reference_tokens = sizer.reference_tokens(fastest[best], costs("full", fastest[best].zero.stage == 3))
    return Sizing(shape, group, machine, groups_per_step, tuple(fastest), best, reference_tokens, couples_groups)


def _slowness(candidate: Candidate) -> tuple[float, float]:
    """Sort key: step time; candidates that do not fit come last, by memory."""
    return (math.inf, candidate.memory.peak) if candidate.time is None else (candidate.time.total, 0.0)


@dataclass(frozen=True)
class _Sizer:
    """Sizes one candidate; holds the settings that candidates share."""

    shape: ModelShape
    machine: Machine
    gpu_memory: float
    host_memory: float
    group: GroupShape
    groups_per_step: int
    dtype: torch.dtype
    num_workers: int
    couples_groups: bool

    @property
    def groups_per_rank(self) -> float:
        return self.groups_per_step / self.machine.world_size

    def memory(self, zero: Zero, costs: ActivationCosts, tokens: float) -> RankMemory:
        load, waiting = self.group.step.load(tokens), 0.0
        if self.couples_groups:
            # The tokens of a step are the same whatever the micro-batch: all but one of its micro-batches wait.
            waiting = max(0.0, self.groups_per_rank * self.group.step.tokens / tokens - 1)
        return rank_memory(self.shape, costs, zero, load, self.machine.world_size, self.dtype, waiting=waiting)

    def candidate(self, name: str, zero: Zero, checkpointing: str, costs: ActivationCosts) -> Candidate:
        least, groups_per_rank = self.group.step.tokens, self.groups_per_rank
        most = max(least, min(_MOST_TOKENS, math.ceil(groups_per_rank * least)))
        tokens = self._largest(zero, costs, least, most)
        memory = self.memory(zero, costs, tokens or least)
        host = node_host_bytes(memory, self.machine.gpus_per_node, self.num_workers)
        micro_batches = max(1, math.ceil(groups_per_rank * least / tokens)) if tokens else 0
        time = None
        if tokens:
            work = self.group.step.work(groups_per_rank)
            time = step_time(self.shape, zero, self.machine, work, micro_batches, checkpointing, self.dtype.itemsize)
        return Candidate(name, zero, checkpointing, tokens, memory, host, micro_batches, time, host <= self.host_memory)

    def _largest(self, zero: Zero, costs: ActivationCosts, least: int, most: int) -> int:
        """Largest micro-batch that fits, in multiples of _TOKEN_STEP and at least one group; 0 if none fits."""

        def fits(tokens: int) -> bool:
            return self.memory(zero, costs, tokens).peak <= self.gpu_memory

        if not fits(least):
            return 0
        if fits(most):
            return most
        low, high = least, most
        while high - low > _TOKEN_STEP:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return max(least, low // _TOKEN_STEP * _TOKEN_STEP)

    def reference_tokens(self, candidate: Candidate, full: ActivationCosts) -> int:
        """Tokens per micro-batch of the reference pass: up to four times those of training; no activations are saved.

        Memory of one layer without a graph is bounded by that of recomputing one layer.
        """
        assert self.group.reference is not None
        states = candidate.memory.parts
        resident = sum(states[name] for name in ("weights", "gathered", "optimizer", "overhead"))
        for factor in (4, 3, 2):
            load = self.group.reference.load(factor * candidate.tokens)
            layer = full.language.forward(load.tokens) - full.language.kept(load.tokens)
            embeddings = 3 * load.tokens * self.shape.text.hidden_size * self.dtype.itemsize
            tower = full.vision.forward(load.patches)
            frozen = replace(self.shape, tensors=tuple(replace(t, trained=False) for t in self.shape.tensors))
            head = head_bytes(frozen, load.responses, self.dtype, "cuda").forward
            if resident + max(tower, layer + embeddings, embeddings + head) <= self.gpu_memory:
                return factor * candidate.tokens
        return candidate.tokens


def memory_gb(candidate: Candidate) -> dict[str, float]:
    """GB of each part of the largest phase, of the peak, and of host memory per node."""
    parts = {name: value / GB for name, value in candidate.memory.parts.items()}
    return {**parts, "peak": candidate.memory.peak / GB, "host": candidate.host / GB}
