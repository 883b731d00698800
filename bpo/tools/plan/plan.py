"""Which DeepSpeed file, how many tokens, which recomputation: every choice is sized, the fastest recommended."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace

import torch

from bpo.config.training import Config
from bpo.data.useful_work import attended_pairs, has_class_token
from bpo.engine import find_ds_config, with_fitting_buckets
from bpo.records import UsefulWork
from bpo.tools.plan.activations import ActivationCosts, activation_costs
from bpo.tools.plan.memory import GB, Load, RankMemory, Zero, head_bytes, node_host_bytes, rank_memory
from bpo.tools.plan.shape import ModelShape, shape_of
from bpo.tools.plan.speed import Machine, StepTime, step_time

# From what needs least communication to what needs most memory elsewhere.
DS_CONFIGS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
CHECKPOINTING = ("none", "selective", "full")
# Micro-batches are sized in steps of so many tokens; above the largest, GPUs gain nothing from more.
_TOKEN_STEP, _MOST_TOKENS = 256, 32768


@dataclass(frozen=True)
class GroupShape:
    """An average group: tokens of its images, prompt and completions; `patches` are rows of the vision tower."""

    image_tokens: int
    patches: int
    prompt_tokens: int
    response_tokens: int
    completions: int
    pairs: float

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.prompt_tokens + self.completions * self.response_tokens

    def work(self, num_groups: float) -> UsefulWork:
        """What `num_groups` of them bring; a tower over windows is counted as if each saw its image whole."""
        pairs = attended_pairs(self.image_tokens + self.prompt_tokens, [self.response_tokens] * self.completions)
        one = (
            self.tokens,
            self.completions * self.response_tokens,
            self.image_tokens,
            pairs,
            self.patches,
            self.patches**2,
            self.patches * 64,
        )
        return UsefulWork(*(round(num_groups * value) for value in one))

    def load(self, tokens: float) -> Load:
        """The rows of a micro-batch of `tokens` packed tokens."""
        share = tokens / self.tokens
        work = self.work(share)
        return Load(tokens, work.responses, work.image_tokens, work.patches)


@dataclass(frozen=True)
class Row:
    """One DeepSpeed file with one kind of recomputation.

    Attributes:
        tokens: Largest micro-batch that fits, in packed tokens; 0 where not even one group fits.
        memory: Of that micro-batch, or of one group where none fits.
        host: Bytes of host memory a node.
        time: Of a step; None where nothing fits.
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
class Plan:
    """All rows, one a file with the fastest recomputation that fits, and the index of the recommended one."""

    shape: ModelShape
    group: GroupShape
    machine: Machine
    groups_per_step: int
    rows: tuple[Row, ...]
    best: int | None
    reference_tokens: int

    def groups_per_second(self, row: Row) -> float:
        return 0.0 if row.time is None else self.groups_per_step / row.time.total

    def reference_seconds(self, num_groups: float) -> float:
        """Of the reference pass over `num_groups`: one forward pass, divided among the ranks."""
        flops = self.shape.flops.forward(self.group.work(1)) * num_groups
        device = self.machine.gpu.peak_tflops * 1e12 * self.machine.utilisation
        return flops / device / self.machine.world_size


def typical_image(model_config: object) -> tuple[int, int]:
    """(image tokens, rows of the tower) of an image of 1024 tokens for Qwen-VL, of the tower's own size elsewhere.

    LLaVA-NeXT and its relatives are counted with four tiles beside the whole image.
    """
    vision = model_config.vision_config  # type: ignore[attr-defined]
    merge = getattr(vision, "spatial_merge_size", None)
    if merge:
        return 1024, 1024 * merge**2
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    patches = (side // patch) ** 2
    tiles = 5 if getattr(model_config, "image_grid_pinpoints", None) else 1
    fixed = getattr(model_config, "mm_tokens_per_image", None)
    scale = getattr(model_config, "scale_factor", None) or 1
    if not fixed and scale == 1 and getattr(model_config, "downsample_ratio", None):
        scale = round(1 / model_config.downsample_ratio)  # type: ignore[attr-defined]
    tokens = tiles * (fixed or patches // scale**2)
    return tokens, tiles * (patches + int(has_class_token(model_config)))


def make_plan(
    model: str,
    config: Config,
    machine: Machine,
    gpu_memory: float,
    host_memory: float,
    group: GroupShape,
    groups_per_step: int = 0,
) -> Plan:
    """Sizes every file of ds_configs/ for `model` on `machine`.

    Args:
        model: See `shape.model_config_of`.
        config: Of the run: what learns, the adapter, dtype, groups a step, data workers.
        gpu_memory: Bytes of one GPU.
        host_memory: Bytes of one node.
        groups_per_step: 0 takes that of the run, raised to one group a rank.

    Raises:
        ValueError: the model is not known.
    """
    shape = shape_of(model, config)
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    groups_per_step = groups_per_step or max(config.train.groups_per_step, machine.world_size)
    costs = functools.cache(lambda mode, gathers: activation_costs(shape, mode, gathers=gathers))
    sizer = _Sizer(shape, machine, gpu_memory, host_memory, group, groups_per_step, dtype, config.data.num_workers)
    rows = []
    for name in DS_CONFIGS:
        settings = json.loads(find_ds_config(f"ds_configs/{name}.json").read_text(encoding="utf-8"))
        zero = Zero.from_settings(with_fitting_buckets(settings, shape.num_trained))
        candidates = [sizer.row(name, zero, mode, costs(mode, zero.stage == 3)) for mode in CHECKPOINTING]
        rows.append(min(candidates, key=_slowness))
    usable = [i for i, row in enumerate(rows) if row.time is not None and row.fits_host]
    best = min(usable, key=lambda i: _slowness(rows[i]), default=None)
    reference = 0 if best is None else sizer.reference_tokens(rows[best], costs("full", rows[best].zero.stage == 3))
    return Plan(shape, group, machine, groups_per_step, tuple(rows), best, reference)


def _slowness(row: Row) -> tuple[float, float]:
    """Seconds of a step; of rows that do not fit, the one that lacks least comes first."""
    return (math.inf, row.memory.peak) if row.time is None else (row.time.total, 0.0)


@dataclass(frozen=True)
class _Sizer:
    """Fits one row; everything that rows share."""

    shape: ModelShape
    machine: Machine
    gpu_memory: float
    host_memory: float
    group: GroupShape
    groups_per_step: int
    dtype: torch.dtype
    num_workers: int

    def memory(self, zero: Zero, costs: ActivationCosts, tokens: float) -> RankMemory:
        load = self.group.load(tokens)
        return rank_memory(self.shape, costs, zero, load, self.machine.world_size, self.dtype)

    def row(self, name: str, zero: Zero, checkpointing: str, costs: ActivationCosts) -> Row:
        least = self.group.tokens
        groups_a_rank = self.groups_per_step / self.machine.world_size
        most = max(least, min(_MOST_TOKENS, math.ceil(groups_a_rank * least)))
        tokens = self._largest(zero, costs, least, most)
        memory = self.memory(zero, costs, tokens or least)
        host = node_host_bytes(memory, self.machine.gpus_per_node, self.num_workers)
        micro_batches = max(1, math.ceil(groups_a_rank * least / tokens)) if tokens else 0
        time = None
        if tokens:
            work = self.group.work(groups_a_rank)
            time = step_time(self.shape, zero, self.machine, work, micro_batches, checkpointing, self.dtype.itemsize)
        return Row(name, zero, checkpointing, tokens, memory, host, micro_batches, time, host <= self.host_memory)

    def _largest(self, zero: Zero, costs: ActivationCosts, least: int, most: int) -> int:
        """Most tokens of a micro-batch that fit, at least one group and in steps of _TOKEN_STEP; 0 where none do."""

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

    def reference_tokens(self, row: Row, full: ActivationCosts) -> int:
        """Tokens of a micro-batch of the reference pass, at most four times those of training: it keeps no layer's.

        What one layer holds without a graph is bounded by what recomputation of one layer holds.
        """
        states = row.memory.parts
        resident = sum(states[name] for name in ("weights", "gathered", "optimizer", "overhead"))
        for factor in (4, 3, 2):
            load = self.group.load(factor * row.tokens)
            layer = full.language.forward(load.tokens) - full.language.kept(load.tokens)
            embeddings = 3 * load.tokens * self.shape.text.hidden_size * self.dtype.itemsize
            tower = full.vision.forward(load.patches)
            frozen = replace(self.shape, tensors=tuple(replace(t, trained=False) for t in self.shape.tensors))
            head = head_bytes(frozen, load.responses, self.dtype, "cuda").forward
            if resident + max(tower, layer + embeddings, embeddings + head) <= self.gpu_memory:
                return factor * row.tokens
        return row.tokens


def row_gb(row: Row) -> dict[str, float]:
    """GB of each part of a row's largest phase, of the peak and of a node's host memory."""
    parts = {name: value / GB for name, value in row.memory.parts.items()}
    return {**parts, "peak": row.memory.peak / GB, "host": row.host / GB}
