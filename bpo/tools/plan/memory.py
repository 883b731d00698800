"""Memory per rank and per node for each ZeRO stage and offload: exact states, traced activations.

States follow the allocations of DeepSpeed 0.19, not the counts of the ZeRO paper (arXiv 1910.02054). docs/sizing.md has
the formulas and the assumptions; benchmarks/memory_check.py compares with measured peaks.

Letters: P parameters, T trained parameters, N ranks, b bytes per weight (2 in bfloat16, 4 in float32).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bpo.config.ds_file import with_group_size
from bpo.tools.plan.activations import ActivationCosts
from bpo.tools.plan.shape import ModelShape
from bpo_kernels.head import HALVES, plan_head

GB = 1e9

# Assumptions, not measured: per GPU, the CUDA context with libraries and NCCL buffers, and the fragmented share of the
# allocator's memory; on the host, the process of a rank and of a data worker.
CUDA_CONTEXT_BYTES = 1.5 * GB
FRAGMENTATION = 0.05
HOST_PROCESS_BYTES = 4.0 * GB
HOST_WORKER_BYTES = 1.0 * GB
# Elements of the buffers between disk and device: `buffer_count` times `buffer_size` of ds_configs/zero3_nvme.json.
NVME_BUFFERS = 5 * 100_000_000


@dataclass(frozen=True)
class Zero:
    """Memory-related settings of a DeepSpeed file; sizes in elements, as in DeepSpeed.

    group_ranks: ranks that share a second copy of the weights (hpZ); 1 without one.
    """

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    overlap_comm: bool = True
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    group_ranks: int = 1
    param_on_nvme: bool = False

    @classmethod
    def from_settings(cls, settings: dict[str, Any], nodes: int = 1, ranks_per_node: int = 1) -> Zero:
        """From a DeepSpeed configuration; missing settings have DeepSpeed's defaults.

        Raises:
            ValueError: hpZ's groups would cross nodes.
        """
        settings = with_group_size(settings, Path("train.ds_config"), nodes * ranks_per_node, ranks_per_node)
        zero = settings.get("zero_optimization", {})
        names = {
            "reduce_bucket": "reduce_bucket_size",
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "sub_group": "sub_group_size",
        }
        sizes = {name: int(zero[key]) for name, key in names.items() if key in zero}
        stage = int(zero.get("stage", 0))
        return cls(
            stage=stage,
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
            group_ranks=zero.get("zero_hpz_partition_size", 1),
            param_on_nvme=zero.get("offload_param", {}).get("device") == "nvme",
            **sizes,
        )

    @property
    def label(self) -> str:
        """For example `ZeRO-3, optimizer and weights on the host`."""
        where = {(True, True): ", optimizer and weights on the host", (True, False): ", optimizer on the host"}
        return f"ZeRO-{self.stage}" + where.get((self.offload_optimizer, self.offload_param), "")


@dataclass(frozen=True)
class Load:
    """One micro-batch of one rank: rows of each part of the model; see `records.UsefulWork`.

    second_targets: tokens that the head scores at the rows of others.
    """

    tokens: float
    responses: float
    image_tokens: float
    patches: float
    second_targets: float = 0.0


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. `peak` is the largest phase; `parts` is the breakdown of that phase.

    Attributes:
        phases: Peak of the forward pass, the backward pass and the optimizer step.
        parts: weights, gathered, optimizer, gradients, buckets, activations, head, step, overhead.
        host: States, gradients and transfer buffers of this rank in host memory.
    """

    phases: dict[str, float]
    parts: dict[str, float]
    host: float = 0.0
    peak: float = field(default=0.0)


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the LM head for one micro-batch.

    Attributes:
        rows: Hidden states of the response rows.
        kept: Saved for the backward pass, including those rows.
        forward: Peak of the forward pass.
        backward: Peak of the backward pass in addition to `kept`.
    """

    rows: float
    kept: float
    forward: float
    backward: float


def head_bytes(
    shape: ModelShape, rows: float, dtype: torch.dtype, device: str, second_targets: float = 0.0
) -> HeadBytes:
    """LM head memory with the mode and chunk that `plan_head` selects for `rows` response tokens on this device.

    The same with and without the kernels' losses. Statistics of the rows (`weighting`, `pairs: argmax`) are a few
    numbers per row, which are not counted; without Triton they take another chunk of logits.

    Args:
        second_targets: Tokens scored at these rows in addition, from gathered rows of hidden states and weight.
    """
    num_rows, vocab, hidden = max(1, int(rows)), shape.text.vocab_size, shape.text.hidden_size
    trained = shape.trains_head
    plan = plan_head("auto", num_rows, vocab, dtype, torch.device(device), True, trained, None, "store")
    size, half = dtype.itemsize, dtype in HALVES
    rows_bytes = num_rows * hidden * size
    logits = plan.step * vocab * 4
    d_chunk = plan.step * vocab * size if half else 0
    kept = rows_bytes + (rows_bytes if plan.keeps_hidden_grad else 0)
    forward = kept + logits + (0 if plan.keeps_dlogits or plan.mode == "recompute" else d_chunk)
    if plan.keeps_dlogits:
        kept += num_rows * vocab * (size if half else 4)
        # fp32 logits of a single chunk become D in place.
        forward = kept + (0 if not half and plan.step >= num_rows else logits)
    backward = rows_bytes + (num_rows * hidden * 4 if half else 0)
    if trained:
        backward += vocab * hidden * size + rows_bytes
    if plan.mode == "recompute":
        backward += logits + d_chunk + vocab * hidden * 4
    if half and device == "cpu":
        extra = _half_on_cpu(plan.step, vocab, hidden)
        forward, backward = forward + extra, backward + (vocab * hidden * 4 if trained else 0)
    head = HeadBytes(float(rows_bytes), float(kept), float(forward), float(backward))
    if not second_targets:
        return head
    return _with_second_targets(head, shape, second_targets, dtype, device, 0.0 if device == "cuda" else logits)


def _with_second_targets(
    head: HeadBytes, shape: ModelShape, second_targets: float, dtype: torch.dtype, device: str, statistics: float
) -> HeadBytes:
    """Adds M second targets: their hidden states [M, H] are kept, and their gradients wait for those of the head."""
    vocab, hidden, size = shape.text.vocab_size, shape.text.hidden_size, dtype.itemsize
    gathered = second_targets * hidden
    # Without Triton, two gathered rows of the weight, a product and a gradient are fp32 tensors of their own.
    forward = gathered * (0 if device == "cuda" else 8 if size == 4 else 12)
    own = gathered * (size if device == "cuda" else 12)
    weight = 0
    if shape.trains_head:
        # Coefficients times hidden states, summed in fp32, beside the gradient of the hidden states.
        own = max(own, vocab * hidden * 4 + gathered * (size + (4 if size == 4 else 8)))
        weight = vocab * hidden * size
    # The gradient of the gathered rows is spread over all rows [N, H], and added to the head's.
    spread = gathered * size + weight + head.rows
    return HeadBytes(
        head.rows,
        head.kept + gathered * size,
        max(head.forward + statistics, head.kept + gathered * size + forward),
        max(own, spread, head.rows + weight + head.backward),
    )


def _half_on_cpu(step: int, vocab: int, hidden: int) -> int:
    """Half-precision products on CPU use fp32: a tile of the weight, and the tile's logits before they are copied."""
    tile = min(vocab, max(1, (16 << 20) // (hidden * 4)))
    return tile * hidden * 4 + step * tile * 4


def rank_memory(
    shape: ModelShape,
    costs: ActivationCosts,
    zero: Zero,
    load: Load,
    world_size: int,
    dtype: torch.dtype,
    device: str = "cuda",
    *,
    accumulates: bool = True,
    waiting: float = 0.0,
) -> RankMemory:
    """Memory of one rank in a step.

    Args:
        shape: The model as it is trained.
        costs: Its activation costs, traced in the same dtype.
        zero: Stage, offload and buckets.
        load: The largest micro-batch.
        world_size: N, ranks that the states are partitioned over.
        dtype: Of weights and activations.
        device: `cuda`, or `cpu` to compare with LiveBytes on CPU: no context, no fragmentation, and the temporaries of
            the unfused AdamW.
        accumulates: Whether a step has several micro-batches, so that gradients persist between them.
        waiting: Micro-batches in addition to the current one whose activations are kept: of terms across groups, all
            forward passes of a step precede its first backward pass.
    """
    size = dtype.itemsize
    by_phase = _parts_by_phase(shape, costs, zero, load, world_size, dtype, device, accumulates, waiting)
    phases = {name: sum(parts.values()) for name, parts in by_phase.items()}
    largest = max(phases, key=lambda name: phases[name])
    overhead = CUDA_CONTEXT_BYTES + FRAGMENTATION * phases[largest] if device == "cuda" else 0.0
    parts = {**by_phase[largest], "overhead": overhead}
    inputs = costs.language.host_bytes(load.tokens) + costs.vision.host_bytes(load.patches)
    host = _host_bytes(shape, zero, world_size, size) + (1 + waiting) * inputs
    return RankMemory(phases, parts, host, phases[largest] + overhead)


def _parts_by_phase(
    shape: ModelShape,
    costs: ActivationCosts,
    zero: Zero,
    load: Load,
    world_size: int,
    dtype: torch.dtype,
    device: str,
    accumulates: bool,
    waiting: float,
) -> dict[str, dict[str, float]]:
    """Breakdown of the peaks of the forward pass, the backward pass and the optimizer step."""
    size = dtype.itemsize
    states = _states(shape, zero, world_size, size)
    gathered = _gathered(shape, zero, world_size, size)
    # The ZeRO-3 step gathers the weights below the persistence threshold.
    small = size * sum(t.numel for t in shape.tensors if t.numel < zero.persistence_threshold) if gathered else 0.0
    bucket = float(min(zero.reduce_bucket, shape.num_trained) * size if zero.stage else 0)
    if zero.stage in (1, 2) and zero.overlap_comm:
        bucket *= 2
    gradients = _gradient_elements(zero, shape.num_trained, world_size, accumulates) * size
    stays = accumulates or zero.stage == 3  # gradients and buckets persist after a backward pass
    head = head_bytes(shape, load.responses, dtype, device, load.second_targets)
    # On GPU, the next micro-batch is copied while the current one is computed.
    pixels = load.patches * patch_elements(shape.config) * size
    images = pixels * (2 if device == "cuda" else 1)
    tower = costs.vision.kept(load.patches) + costs.projector_kept_per_row * load.image_tokens
    kept = costs.language.kept(load.tokens) + tower
    layers = max(costs.vision.forward(load.patches), tower + costs.language.forward(load.tokens))
    of_head = head.forward if kept + head.forward > layers else 0.0
    # The head's saved tensors are freed before the backward pass of the layers; gradients are allocated from the start.
    transient = head.rows + costs.language.backward(load.tokens) - costs.language.kept(load.tokens)
    head_last = head.kept + head.backward if head.kept + head.backward > transient else 0.0
    step = _step_bytes(zero, shape.num_trained / world_size, size, device)

    def phase(
        gathered: float, gradients: float, buckets: float, activations: float, head: float, step: float
    ) -> dict[str, float]:
        fixed = {"gathered": gathered, "gradients": gradients, "buckets": buckets}
        return {**states, **fixed, "activations": activations, "head": head, "step": step}

    held, filled = (gradients, bucket) if stays else (0.0, 0.0)
    others, of_heads = images + waiting * (kept + pixels), waiting * head.kept
    first, last = (kept if of_head else layers), kept + (0.0 if head_last else transient)
    return {
        "forward": phase(gathered, held, filled, others + first, of_heads + of_head, 0.0),
        "backward": phase(gathered, gradients, bucket, others + last, of_heads + head_last, 0.0),
        "step": phase(small, gradients, bucket if zero.stage == 3 else 0.0, images, 0.0, step),
    }


def patch_elements(config: Any) -> int:
    """Pixel values per row of the vision tower."""
    vision = config.vision_config
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return 3 * side * side * (getattr(vision, "temporal_patch_size", None) or 1)


def _states(shape: ModelShape, zero: Zero, world_size: int, size: int) -> dict[str, float]:
    """Weights and optimizer state on the device; DeepSpeed keeps a master copy even of fp32 weights."""
    trained = shape.num_trained
    if zero.stage == 3:
        weights = 0.0 if zero.offload_param else shape.num_parameters / world_size * size
        if zero.group_ranks > 1:
            weights += shape.num_parameters / zero.group_ranks * size
    else:
        weights = float(shape.num_parameters * size)
    if zero.offload_optimizer:
        return {"weights": weights, "optimizer": 0.0}
    share = trained / (world_size if zero.stage else 1)
    # fp32 master and two moments; without ZeRO, DeepSpeed accumulates bf16 gradients in fp32.
    return {"weights": weights, "optimizer": (16 if zero.stage == 0 else 12) * share}


def _gathered(shape: ModelShape, zero: Zero, world_size: int, size: int) -> float:
    """Peak of gathered weights under ZeRO-3: weights kept for reuse, and prefetched weights.

    A weight stays gathered if fewer than `stage3_max_reuse_distance` elements are used before its next use, and
    `stage3_max_live_parameters` bounds the prefetch. A single rank without parameter offload gathers nothing.
    """
    if zero.stage != 3 or (world_size == 1 and not zero.offload_param):
        return 0.0
    most = max(zero.max_live, max(t.numel for t in shape.tensors)) + zero.prefetch_bucket
    return float(min(shape.num_parameters, most) * size)


def _gradient_elements(zero: Zero, trained: int, world_size: int, accumulates: bool) -> float:
    """Gradient elements per rank: its partition; under ZeRO-1 with accumulation, also the full gradients."""
    if zero.offload_optimizer:
        return 0.0
    if zero.stage == 0:
        return float(trained)
    return trained / world_size + (trained if zero.stage == 1 and accumulates else 0)


def _step_bytes(zero: Zero, share: float, size: int, device: str) -> float:
    """Temporaries of the optimizer step; `share` = T / N.

    ZeRO-1 and 2 flatten the gradients and convert them to fp32; ZeRO-3 does so one sub-group at a time.
    """
    if zero.offload_optimizer:
        return 0.0
    if zero.stage == 3:
        share = min(share, zero.sub_group)
    adam = 8 * share if device == "cpu" else 0.0  # two fp32 temporaries of the unfused AdamW
    flat = size * share if zero.stage in (1, 2) and size == 2 else 0.0
    fp32 = 4 * share
    return max(flat + fp32, fp32 + adam - (size * share if zero.stage in (1, 2) else 0.0))


def _host_bytes(shape: ModelShape, zero: Zero, world_size: int, size: int) -> float:
    """Host bytes of one rank: fp32 master, moments and gradients, transfer buffer; with parameter offload, weights or,
    if those are on a disk, the buffers.
    """
    if not zero.offload_optimizer:
        return 0.0
    share = shape.num_trained / world_size
    largest = max((t.numel for t in shape.tensors if t.trained), default=0)
    host = (4 + 8 + 4 + 2 * size) * share + largest * size
    if zero.offload_param:
        host += NVME_BUFFERS * size if zero.param_on_nvme else shape.num_parameters / world_size * size
    return host


def node_host_bytes(memory: RankMemory, ranks_per_node: int, num_workers: int) -> float:
    """Host memory of one node: offloaded states, rank processes, and `data.num_workers` workers per rank."""
    return ranks_per_node * (memory.host + HOST_PROCESS_BYTES + num_workers * HOST_WORKER_BYTES)
