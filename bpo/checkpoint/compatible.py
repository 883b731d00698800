"""May this run continue that checkpoint? Field by field: what may change freely, what changes rounding, what may not.

A resumed run repeats the unbroken one bit for bit only if everything that a step depends on is what it was. What is
not is refused with its name, the old and the new value, and the flag that accepts it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bpo.checkpoint.files import CheckpointError

logger = logging.getLogger(__name__)

# Paths and operation: no step depends on them (what lies at the paths is compared by content).
FREE = (
    "bootstrap.*",
    "evaluation.*",
    "export.*",
    "model.path",
    "model.trust_remote_code",
    "data.annotations",
    "data.groups",
    "data.image_root",
    "data.keep_lengths",
    "data.on_bad",
    "data.max_bad_share",
    "data.num_workers",
    "data.prefetch_factor",
    "train.output_dir",
    "train.resume",
    "train.accept_changes",
    "train.save_every_steps",
    "train.keep_last",
    "train.keep_every",
    "train.save_in_background",
    "train.hang_timeout_seconds",
    "train.max_idle_restarts",
    "train.log_every_steps",
    "train.tensorboard",
    "train.reference_dir",
    "train.reference_micro_batch_tokens",
    "train.rehash_weights",
    "train.first_loss_tolerance",
    "train.peak_tflops",
)
# The same sums in another order, and with dropout other masks: losses agree to rounding, not bit for bit.
ROUNDING = (
    "model.attention",
    "model.gradient_checkpointing",
    "model.share_prefix",
    "model.vision_attention",
    "train.ds_config",
    "train.max_micro_batch_tokens",
)
# Named in train.accept_changes like an option; what they stand for is compared by content.
DATA, WEIGHTS, PLAN = "data", "weights", "plan"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_options(
    manifest: Mapping[str, Any], now: Mapping[str, Any], world_size: int, accepted: Sequence[str], *, warn: bool = True
) -> None:
    """Compares the configuration of a checkpoint with this run's; says aloud what changes rounding.

    Options that one of the two versions of bpo does not know are left out.

    Args:
        warn: Warn; one rank of a job is enough.

    Raises:
        CheckpointError: an option that decides what a step computes has another value and is not in `accepted`.
    """
    old, new = flatten(manifest["config"]), flatten(now)
    differing = [k for k in sorted(old.keys() & new.keys()) if old[k] != new[k] and not _matches(k, FREE)]
    rounding = [f"{key} {old[key]!r} -> {new[key]!r}" for key in differing if key in ROUNDING]
    if manifest["world_size"] != world_size:
        rounding.insert(0, f"{manifest['world_size']} -> {world_size} ranks")
    if rounding and warn:
        logger.warning(
            "resuming with %s: the same groups in the same steps, losses equal to rounding (dropout draws anew), not "
            "bit for bit",
            ", ".join(rounding),
        )
    breaking = [key for key in differing if key not in ROUNDING]
    refuse([(key, old[key], new[key]) for key in breaking], manifest["step"], accepted, warn=warn)


def check_content(
    manifest: Mapping[str, Any], name: str, fingerprint: str, accepted: Sequence[str], *, warn: bool = True
) -> None:
    """Compares the fingerprint of the data or the base weights with the checkpoint's.

    Raises:
        CheckpointError: it differs and `name` is not in `accepted`.
    """
    before = manifest["fingerprints"][name]
    if before != fingerprint:
        refuse([(name, before[:16], fingerprint[:16])], manifest["step"], accepted, warn=warn)


def refuse(changes: Sequence[tuple[str, Any, Any]], step: int, accepted: Sequence[str], *, warn: bool) -> None:
    """Raises CheckpointError for changes that were not accepted, warns of those that were."""
    refused = [change for change in changes if change[0] not in accepted]
    for name, old, new in changes:
        if name in accepted and warn:
            logger.warning("resuming at step %d with another %s (accepted): %r -> %r", step, name, old, new)
    if not refused:
        return
    explained = {
        DATA: "the groups, their tokens, images or pairs differ: done steps would not be this run's",
        WEIGHTS: "the base model's files differ: the trained weights belong to other frozen ones",
        PLAN: "the order of the groups in the steps that are done differs: another version of the plan",
    }
    lines = [
        f"  {name}: {old!r} -> {new!r}" + (f" ({explained[name]})" if name in explained else "")
        for name, old, new in refused
    ]
    flag = "[" + ", ".join(f'"{name}"' for name, _, _ in refused) + "]"
    raise CheckpointError(
        f"the checkpoint of step {step} cannot be continued exactly; what differs (checkpoint -> this run):\n"
        + "\n".join(lines)
        + f"\nPut it back, or accept the change: --train.accept_changes '{flag}'. Free to change: number of ranks and "
        + ", ".join(ROUNDING + FREE)
    )


def content_digest(lines: Iterable[str]) -> str:
    """SHA-256 of lines in their order."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
