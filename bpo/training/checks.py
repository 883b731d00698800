"""Fail-fast checks: non-finite losses and gradients; a policy that differs from the reference at step 0."""

from __future__ import annotations

import hashlib
import logging
import math

import torch

from bpo.config.adapter import is_adapter
from bpo.config.training import Config
from bpo.data.schedule import PlannedStep
from bpo.engine import TrainingEngine
from bpo.job.collectives import gather_from_ranks
from bpo.job.exits import JobError
from bpo.losses.program import LossProgram
from bpo.model.reference.store import other_reference
from bpo.training.metrics import StepSums, step_metrics

logger = logging.getLogger(__name__)


class NonFiniteError(JobError):
    """The loss or gradient of a step is not finite; names the groups."""


class FirstStepError(JobError):
    """Policy and reference differ before the first step."""


def check_reference(config: Config, program: LossProgram) -> None:
    """Raises ValueError if `train.reference_model` or `train.reference_only` does not fit the run."""
    chosen = [name for name in ("reference_model", "reference_only") if getattr(config.train, name)]
    if chosen and not program.needs_reference:
        raise ValueError(f"train.{chosen[0]} is set, but the loss has no reference; remove it")
    if config.train.reference_only and (other := other_reference(config)):
        raise ValueError(
            f"train.reference_only fills the store for model.path {config.model.path}, but train.reference_model is "
            f"{other}; set model.path to it"
        )


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Seeds dropout by position in the run, so that a resumed run draws the same masks as an uninterrupted one.

    Returns:
        The seed of PyTorch's generator, for `adapter_dropout`.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{micro_batch}:{rank}".encode()).digest()
    derived = int.from_bytes(digest[:7], "little")
    torch.manual_seed(derived)
    return derived


def check_weights(model: torch.nn.Module, path: str, rank: int) -> None:
    """Stops all ranks together if a weight of the base model is not finite: it would look like a fault of the data.

    Reads the weights once, on their device; under ZeRO-3 each rank its own part.

    Raises:
        NonFiniteError: names the tensors.
    """
    broken = {name for rank in gather_from_ranks(_non_finite_weights(model, rank)) for name in rank}
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise NonFiniteError(
            f"{path}: the model's own weights are not finite: {', '.join(sorted(broken)[:3])}{more}; the files are "
            "damaged, or the training that wrote them diverged, or model.dtype is too narrow; use another copy"
        )


@torch.no_grad()
def _non_finite_weights(model: torch.nn.Module, rank: int) -> list[str]:
    broken = []
    for name, parameter in model.named_parameters():
        part, disk = parameter.detach(), None
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3; the last part is padded with uninitialised memory
            if parameter.ds_tensor.dim() == 0:  # on NVMe
                disk = parameter.nvme_swapper  # type: ignore[attr-defined]
                disk.swap_in([parameter], async_op=False)
            size = parameter.ds_tensor.numel()
            part = parameter.ds_tensor[: max(0, parameter.ds_numel - rank * size)]  # type: ignore[attr-defined]
        # The extremes are NaN if any value is; unlike isfinite of all values, they need no memory.
        if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
            broken.append(name.replace(".base_layer", ""))
        if disk is not None:
            disk.remove_partition_and_release_buffers([parameter])
    return broken


def check_finite(sums: StepSums, step: PlannedStep, reduced: list[float], engine: TrainingEngine) -> None:
    """Stops all ranks together if a reduced value, the same on every rank, is not finite.

    Raises:
        NonFiniteError: names the groups whose loss is not finite, or all of the step if only the gradient is not.
    """
    if all(math.isfinite(value) for value in reduced):
        return
    culprits = sorted({group for rank in gather_from_ranks(sums.non_finite_groups) for group in rank})
    what = "loss" if culprits else "gradient"
    names = culprits or sorted({g for batch in gather_from_ranks(sums.groups) for g in batch})
    raise NonFiniteError(
        f"the {what} of step {step.index + 1} is not finite; groups: {', '.join(names)}. "
        "Inspect these records, lower train.lr, or use float32/bfloat16 (model.dtype)"
    )


def check_first_step(config: Config, flat: list[float], sums: StepSums, engine: TrainingEngine) -> None:
    """Checks that the first step's loss is its value for policy = reference (log 2 for DPO), computed from its terms.

    A loss without a reference has nothing to compare. With `train.reference_model`, or a continued adapter with dropout
    (that of a new one has no effect, as its B is zero), both values are only logged.

    Raises:
        FirstStepError: the gap exceeds the tolerance: the reference is not the model being trained.
    """
    half_precision = engine.dtype != torch.float32
    tolerance = config.train.first_loss_tolerance or (2e-2 if half_precision else 1e-4)
    metrics = step_metrics(flat, engine.program)
    if not metrics or not engine.program.needs_reference:  # no metrics: the step has lost all its groups
        return
    loss = metrics["loss"]
    expected_sum, num_pairs = engine.sum_over_ranks([sums.expected_first_loss, sums.num_pairs])
    expected = expected_sum / num_pairs
    gap = abs(loss - expected)
    token_gap = max(gather_from_ranks(sums.reference_gap))
    logger.info(
        "first step: loss %.8f, %.8f for policy = reference, gap %.2e; largest token log-prob gap %.2e",
        loss,
        expected,
        gap,
        token_gap,
    )
    is_dropped = config.lora.dropout > 0 and is_adapter(config.model.path)
    if not gap <= tolerance and not is_dropped and not other_reference(config):
        raise FirstStepError(
            f"the first step's loss is {loss:.6f} but must be {expected:.6f} within {tolerance:g}: policy and "
            f"reference differ by up to {token_gap:.3g} nats per token. Check for dropout outside the adapter "
            "(attention_dropout in the model's config) and for a reference store of other weights"
        )
