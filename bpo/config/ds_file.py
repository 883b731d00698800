"""Checks what a DeepSpeed file sets, and completes what depends on the nodes, before any long work starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# bfloat16 has 8 significant bits: neighbouring values differ by 2^-8 to 2^-7 of the value, and a sum is rounded to the
# nearest, so an update below 2^-9 of the value is lost.
_BF16_HALF_STEP = 2.0**-9

_SHARED = "its ranks compute one batch together, but bpo gives every rank groups of its own"
_ROUNDED = "the layers would use weights rounded to 8 bits: log-probs of another model than the one that is saved"
# Settings that would change the results, or do nothing, by their path in the file.
_REFUSED = {
    "zero_optimization.zero_quantized_weights": _ROUNDED,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDED,
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded to 4 bits on their way to their rank",
    "zero_optimization.zenflow": "most weights would be updated later, with gradients of earlier steps",
    "compile.deepcompile": "it acts only after engine.compile(), which bpo does not call; see model.compile",
    "tensor_parallel": _SHARED,
    "sequence_parallel_size": _SHARED,
    "gradient_allreduce_op": "bpo scales the loss for gradients that DeepSpeed averages over the ranks",
}


def check_results(settings: dict[str, Any], where: Path, lr: float, adam_beta2: float) -> None:
    """Rejects settings that would train something other than what the configuration says.

    Raises:
        ValueError: master weights or optimizer states in 16 bits, quantized communication, or ranks that share a batch.
    """
    for path, reason in (*_lossy_states(lr, adam_beta2), *_REFUSED.items()):
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value is not False and not (path.endswith("_size") and value == 1):
            raise ValueError(f"{where}: `{path}` is not supported: {reason}; remove it")


def _lossy_states(lr: float, adam_beta2: float) -> Iterator[tuple[str, str]]:
    """16-bit states by key, with the updates that they lose."""
    weights = (
        f"AdamW changes a weight by about train.lr = {lr:g} per step, and bfloat16 rounds that away for every weight "
        f"above {lr / _BF16_HALF_STEP:.2g} (512 x train.lr: half a step of bfloat16 is at least 2^-9 of a weight)"
    )
    moments = weights
    if 1 - adam_beta2 < _BF16_HALF_STEP:
        moments = (
            f"a second moment decays by 1 - train.adam_beta2 = {1 - adam_beta2:.2g} of its value per step, and "
            "bfloat16 rounds away what is less than 2^-9 = 0.002 of it: it would never decrease"
        )
    for block, dtype in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        yield f"{block}.{dtype}_optimizer_states", moments
        yield f"{block}.{dtype}_master_weights_and_grads", weights


def with_group_size(
    settings: dict[str, Any], where: Path, world_size: int, ranks_per_node: int | None
) -> dict[str, Any]:
    """Fills in the number of ranks in hpZ's groups, each of which has a whole copy of the weights.

    Args:
        ranks_per_node: None if the launcher does not say.

    Raises:
        ValueError: groups would cross nodes, or the size of a node is unknown.
    """
    zero = settings.get("zero_optimization", {})
    size = zero.get("zero_hpz_partition_size", 1)
    if size == 1:
        return settings
    size = _group_size(size, where, world_size, ranks_per_node)
    return {**settings, "zero_optimization": {**zero, "zero_hpz_partition_size": size}}


def complete_zero(settings: dict[str, Any], where: Path, world_size: int, ranks_per_node: int | None) -> dict[str, Any]:
    """`with_group_size`, and the values of variables in the paths of NVMe directories.

    Raises:
        ValueError: as `with_group_size`, or an NVMe directory does not exist.
    """
    settings = with_group_size(settings, where, world_size, ranks_per_node)
    zero = dict(settings.get("zero_optimization", {}))
    for part in ("offload_param", "offload_optimizer"):
        if zero.get(part, {}).get("device") == "nvme":
            zero[part] = {**zero[part], "nvme_path": _nvme_directory(zero[part].get("nvme_path"), part, where)}
    return {**settings, "zero_optimization": zero} if zero else settings


def _group_size(size: Any, where: Path, world_size: int, ranks_per_node: int | None) -> int:
    """Ranks that share a whole copy of the weights: those of a node; 1 on a single node, which has a copy already."""
    key = f"{where}: zero_hpz_partition_size"
    if ranks_per_node is None:
        if size == "auto":
            raise ValueError(
                f"{key} is auto, but the launcher does not say how many ranks a node has; write the number"
            )
        ranks_per_node = size
    elif size == "auto":
        size = ranks_per_node
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{key} is {size!r}; write the number of GPUs per node, or auto")
    if ranks_per_node == world_size:
        return 1
    if ranks_per_node % size or world_size % size:
        raise ValueError(
            f"{key} is {size}, but a node has {ranks_per_node} ranks and the job {world_size}: groups would cross "
            f"nodes, and so would every gather of weights; set it to {ranks_per_node}, or to auto"
        )
    return size


def _nvme_directory(given: str | None, part: str, where: Path) -> str:
    path = os.path.expandvars(given or "")
    if not path or "$" in path:
        raise ValueError(
            f"{where}: {part}.nvme_path is {given or 'empty'}; set that variable to a directory on a local NVMe disk, "
            "the same on every node, or write its path in a copy of the file"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{where}: {part}.nvme_path {path} is not a writable directory; create it on every node")
    return path
