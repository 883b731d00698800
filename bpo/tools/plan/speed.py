"""Step time, computed from FLOPs at a share of peak and from bytes at published bandwidths; not measured.

Letters: P parameters, T trained parameters, N ranks, b bytes per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from bpo.records import UsefulWork
from bpo.tools.plan.memory import Zero
from bpo.tools.plan.shape import ModelShape
from bpo.training.hardware import Accelerator

# DeepSpeed's CPU Adam reads master, gradient and both moments and writes master, moments and bf16 weights.
_CPU_ADAM_BYTES = 4 * 4 + 3 * 4 + 2


@dataclass(frozen=True)
class Machine:
    """The hardware of a run. Bandwidths are GB/s in one direction.

    Attributes:
        gpu: Data sheet figures.
        nodes, gpus_per_node: Numbers of nodes and GPUs.
        node_gb_s: Network bandwidth per GPU; 50 is one 400 Gbit/s adapter per GPU.
        host_memory_gb_s: Memory bandwidth per node, shared by its ranks, for CPU Adam.
        nvme_gb_s: Read bandwidth of the local disks per node, shared by its ranks, for weights on NVMe.
        utilisation: Share of `gpu.peak_tflops` reached by matrix products, including recomputation.
        overlap: Share of communication that overlaps with computation, limited by the computation time.
    """

    gpu: Accelerator
    nodes: int = 1
    gpus_per_node: int = 8
    node_gb_s: float = 50.0
    host_memory_gb_s: float = 200.0
    utilisation: float = 0.4
    overlap: float = 0.7
    nvme_gb_s: float = 12.0

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. `total` is less than the sum if communication overlaps with computation.

    Attributes:
        useful: Time of the useful FLOPs at peak; `recomputed`: the same for recomputation.
        sent_bytes: Bytes sent by one rank.
    """

    compute: float
    communication: float
    offload: float
    total: float
    useful: float
    recomputed: float
    sent_bytes: float

    @property
    def mfu(self) -> float:
        """Useful FLOPs as a share of the devices' peak in that time."""
        return self.useful / self.total if self.total else 0.0


def recomputed_flops(shape: ModelShape, work: UsefulWork, checkpointing: str) -> float:
    """FLOPs repeated in the backward pass: the language model's forward pass, and the tower's if it is trained.

    `selective` keeps the results of matrix products and attention, so it adds no counted FLOPs.
    """
    if checkpointing not in ("full", "offload"):
        return 0.0
    macs = shape.flops.forward_macs(work)
    return 2.0 * (macs["language"] + macs["attention"] + (macs["vision"] if shape.flops.vision_trained else 0))


def communicated_bytes(shape: ModelShape, zero: Zero, world_size: int, micro_batches: int, size: int) -> float:
    """Bytes sent by one rank per step (arXiv 1910.02054, section 7; ring collectives: (N - 1) / N of the volume).

    ZeRO-0 all-reduces gradients, 2Tb. ZeRO-1 reduce-scatters gradients and all-gathers weights, 2Tb. ZeRO-2 does the
    same with one reduce-scatter per micro-batch. Per micro-batch, ZeRO-3 gathers all weights, including frozen ones, in
    the forward and in the backward pass, 2Pb, and reduce-scatters gradients, Tb.

    hpZ (arXiv 2306.10209, section 3.2) gathers within groups of n ranks, (n - 1) / n of the same volume; over all ranks
    it gathers only the weights that a step has changed, once per step, Tb, and reduce-scatters the gradients as before.
    """
    within, across = _volumes(shape, zero, micro_batches, size)
    groups = zero.group_ranks
    return within * (groups - 1) / groups + across * (world_size - 1) / world_size


def _volumes(shape: ModelShape, zero: Zero, micro_batches: int, size: int) -> tuple[float, float]:
    """Bytes of the collectives of one step within hpZ's groups, and over all ranks."""
    trained, whole = shape.num_trained * size, shape.num_parameters * size
    if zero.group_ranks > 1:
        return micro_batches * 2.0 * whole - trained, (micro_batches + 1.0) * trained
    volume = {
        0: 2.0 * trained,
        1: 2.0 * trained,
        2: (micro_batches + 1.0) * trained,
        3: micro_batches * (2.0 * whole + trained),
    }[zero.stage]
    return 0.0, volume


def _communication_seconds(shape: ModelShape, zero: Zero, machine: Machine, micro_batches: int, size: int) -> float:
    """A ring runs at the speed of its slowest link: the network if it spans several nodes."""
    within, across = _volumes(shape, zero, micro_batches, size)
    ranks, links = machine.world_size, machine.gpu.link_gb_s * 1e9
    between = links if machine.nodes == 1 else min(links, machine.node_gb_s * 1e9)
    return within * (1 - 1 / zero.group_ranks) / links + across * (1 - 1 / ranks) / between


def _offload_seconds(
    shape: ModelShape, zero: Zero, machine: Machine, micro_batches: int, size: int, inputs_bytes: float, compute: float
) -> float:
    """Transfers to and from the host that nothing hides, and the CPU's Adam."""
    link, ranks = machine.gpu.host_gb_s * 1e9, machine.world_size
    seconds = max(0.0, 2 * inputs_bytes / link - compute)  # copied while layers run
    share = shape.num_trained / ranks
    if zero.offload_optimizer:
        adam = share * machine.gpus_per_node * _CPU_ADAM_BYTES / (machine.host_memory_gb_s * 1e9)
        seconds += 2 * share * size / link + adam
    if zero.offload_param:
        # Each rank's partition of the weights is copied to the device before every gather.
        read = micro_batches * 2 * shape.num_parameters / ranks * size
        seconds += read / link
        if zero.param_on_nvme:
            seconds += (read + share * size) * machine.gpus_per_node / (machine.nvme_gb_s * 1e9)
    return seconds


def step_time(
    shape: ModelShape,
    zero: Zero,
    machine: Machine,
    work: UsefulWork,
    micro_batches: int,
    checkpointing: str,
    size: int = 2,
) -> StepTime:
    """Time of a step in which every rank does `work` in `micro_batches` micro-batches.

    Args:
        work: Work of one rank in the whole step.
        size: b, bytes per weight.
    """
    peak = machine.gpu.peak_tflops * 1e12
    useful = float(shape.flops.step(work))
    again = recomputed_flops(shape, work, checkpointing)
    compute = (useful + again) / (peak * machine.utilisation)
    sent = communicated_bytes(shape, zero, machine.world_size, micro_batches, size)
    communication = _communication_seconds(shape, zero, machine, micro_batches, size)
    inputs = 0.0
    if checkpointing == "offload":
        inputs = float(shape.text.num_hidden_layers * shape.text.hidden_size * size * work.tokens)
    offload = _offload_seconds(shape, zero, machine, micro_batches, size, inputs, compute)
    hidden = min(machine.overlap * communication, compute)
    total = compute + communication - hidden + offload
    return StepTime(compute, communication, offload, total, useful / peak, again / peak, sent)
