"""What it costs to keep the features of a frozen vision tower (`vision.cache`), and when that pays.

An image takes patches x width x bytes per value x inputs of the projector. Keeping them saves the tower's FLOPs in each
pass after the first, and costs reading them: bytes / speed of the disk, and a copy and a checksum on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from bpo.model.vision.tower import FrozenTower
from bpo.tools.plan.group import PackedShape
from bpo.tools.plan.shape import ModelShape
from bpo.tools.plan.speed import Machine

# Copy and checksum of one core, from the page cache: 1.5 GB/s measured with entries of 1.2 MB (docs/sizing.md).
HOST_GB_S = 1.5


@dataclass(frozen=True)
class FeatureCost:
    """Figures of one image, on one GPU. The first pass over the images is the reference pass, if there is one.

    Attributes:
        num_bytes: Size of its features.
        flops: Of the tower.
        encode_s: Seconds to encode it.
        copy_s: Seconds to check it on the host and to copy it to the GPU.
        disk_gb_s: Share of the disk's speed, in reading and in writing.
        step_share: Share of the tower in the FLOPs of a step.
    """

    num_bytes: float
    flops: float
    encode_s: float
    copy_s: float
    disk_gb_s: float
    step_share: float

    @property
    def read_s(self) -> float:
        return self.num_bytes / (self.disk_gb_s * 1e9) + self.copy_s

    @property
    def passes(self) -> float | None:
        """Later passes after which a cache on disk has saved more than it cost to write; None if it never does."""
        saved_s = self.encode_s - self.read_s
        return self.num_bytes / (self.disk_gb_s * 1e9) / saved_s if saved_s > 0 else None

    @property
    def least_gb_s(self) -> float | None:
        """Speed of the disk per GPU from which reading is faster than encoding; None if none is enough."""
        left_s = self.encode_s - self.copy_s
        return self.num_bytes / left_s / 1e9 if left_s > 0 else None


def feature_cost(shape: ModelShape, machine: Machine, packed: PackedShape, size: int = 2) -> FeatureCost | None:
    """The cost of the average image of a group, on local disks; None without images, or with a trained tower.

    Args:
        size: Bytes per value.
    """
    images = sum(view.images for view in packed.views)
    if shape.flops.vision_trained or not images:
        return None
    vision, work = shape.config.vision_config, packed.work(1)
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    layers = getattr(shape.config, "vision_feature_layer", None)
    inputs = FrozenTower(*shape.meta_model).num_inputs * (len(layers) if isinstance(layers, list) else 1)
    flops = 2 * shape.flops.forward_macs(work)["vision"]
    num_bytes = packed.image.patches * width * inputs * size
    return FeatureCost(
        num_bytes=num_bytes,
        flops=flops / images,
        encode_s=flops / images / (machine.gpu.peak_tflops * 1e12 * machine.utilisation),
        copy_s=num_bytes * (1 / HOST_GB_S + 1 / machine.gpu.host_gb_s) / 1e9,
        disk_gb_s=machine.nvme_gb_s / machine.gpus_per_node,
        step_share=flops / shape.flops.step(work),
    )


def describe(cost: FeatureCost | None) -> list[str]:
    """Lines for `bpo plan`."""
    if cost is None:
        return []
    if cost.passes is not None:
        pays = f"pays after {cost.passes:.1f} passes over the data"
    elif cost.least_gb_s is not None:
        pays = f"pays from {cost.least_gb_s:.1f} GB/s per GPU"
    else:
        pays = "never pays: checking the bytes takes longer than encoding"
    return [
        f"frozen tower: {cost.flops / 1e12:.2f} TFLOP per image, {cost.step_share:.1%} of a step; features of "
        f"{cost.num_bytes / 1e6:.2f} MB per image take {1e3 * cost.encode_s:.2f} ms to compute,",
        f"  {1e3 * cost.read_s:.2f} ms to read at {cost.disk_gb_s:.2g} GB/s per GPU: vision.cache: disk {pays}",
    ]
