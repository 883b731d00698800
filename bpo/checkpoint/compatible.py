"""Compares a checkpoint with the run that is to continue it, field by field: free, rounding-only or breaking changes.

A resumed run repeats the uninterrupted one bit for bit only if everything that a step depends on is unchanged. A
breaking change is refused with its name, the old and the new value, and the flag that accepts it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bpo.checkpoint.files import CheckpointError
from bpo.config.io import flat_tree

logger = logging.getLogger(__name__)

# Paths and operation: no step depends on them (the content at the paths is compared).
FREE = (
    "bootstrap.*",
    "evaluation.*",
    "export.*",
    "measure.*",
    "rank.*",
    "rounds.*",
    "select.*",
    "tracking.*",
    "vision.cache_dir",
    "vision.cache_gb",
    "loss.plugin",
    "model.path",
    "model.trust_remote_code",
    "data.annotations",
    "data.groups",
    "data.image_root",
    "data.part",
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
    "train.evaluate_every_steps",
    "train.evaluation_images",
    "train.keep_best",
    "train.tensorboard",
    "train.reference_dir",
    "train.reference_model",
    "train.reference_only",
    "train.reference_micro_batch_tokens",
    "train.rehash_weights",
    "train.first_loss_tolerance",
    "train.peak_tflops",
)
# The same sums in another order, and other dropout masks: losses agree to rounding, not bit for bit.
ROUNDING = (
    "lora.kernel",
    "model.attention",
    "model.compile",
    "model.compile_buckets",
    "model.gradient_checkpointing",
    "model.layer_kernels",
    "model.patch_embedding",
    "model.share_prefix",
    "model.vision_attention",
    "train.ds_config",
    "train.max_micro_batch_tokens",
    "vision.encode",
    "vision.batch_tokens",
    "vision.cache",
    "online.batch_size",
    "online.publish_reference",
)
# Not free if negatives are made during training.
ONLINE = ("bootstrap.segment.*", "bootstrap.validate.*")
# Named in train.accept_changes like options; compared by content.
DATA, WEIGHTS, PLAN, PLUGIN, REFERENCE = "data", "weights", "plan", "plugin", "reference"


def base_files(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of each file of the base model, from `model_fingerprint`."""
    return {
        name.removeprefix("file:"): value for name, value in sorted(fingerprint.items()) if name.startswith("file:")
    }


def base_digest(files: Mapping[str, str]) -> str:
    """The fingerprint `WEIGHTS` of a checkpoint."""
    return content_digest(f"file:{name} {value}" for name, value in sorted(files.items()))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_options(
    manifest: Mapping[str, Any], now: Mapping[str, Any], world_size: int, accepted: Sequence[str], *, warn: bool = True
) -> None:
    """Compares the configuration of a checkpoint with this run's; warns about changes that affect only rounding.

    Options that exist in only one of the two versions of bpo are ignored.

    Args:
        warn: Whether to log warnings; one rank of a job is enough.

    Raises:
        CheckpointError: an option that affects the result of a step has changed and is not in `accepted`.
    """
    old, new = _flat_options(manifest["config"]), _flat_options(now)
    free = [k for k in new if _matches(k, FREE) and not (new.get("online.source") and _matches(k, ONLINE))]
    differing = [k for k in sorted(old.keys() & new.keys() - set(free)) if old[k] != new[k]]
    rounding = [f"{key} {old[key]!r} -> {new[key]!r}" for key in differing if key in ROUNDING]
    if manifest["world_size"] != world_size:
        rounding.insert(0, f"{manifest['world_size']} -> {world_size} ranks")
    if rounding and warn:
        logger.warning(
            "resuming with %s: the same groups in the same steps, losses equal to rounding (dropout masks differ), not "
            "bit for bit",
            ", ".join(rounding),
        )
    breaking = [(key, old[key], new[key]) for key in differing if key not in ROUNDING]
    if (
        "loss_states" not in manifest
        and old.get("loss.type") == new.get("loss.type") == "ipo"
        and not new["loss.terms"]
    ):
        # Written before lists of terms existed.
        breaking.append(
            ("loss.type", "ipo on sums of log-probs", "ipo on means; for sums, loss.terms with length: sum")
        )
    refuse(breaking, manifest["step"], accepted, warn=warn)


def _flat_options(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted name. Mappings that the user names (`loss.options`, `loss.views`) are compared as a whole."""
    loss = tree["loss"]
    whole = {f"loss.{name}": loss[name] for name in ("options", "views") if name in loss}
    rest = {name: value for name, value in loss.items() if f"loss.{name}" not in whole}
    return {**flat_tree({**tree, "loss": rest}), **whole}


def check_content(
    manifest: Mapping[str, Any], name: str, fingerprint: str, accepted: Sequence[str], *, warn: bool = True
) -> None:
    """Compares the fingerprint of the data, the base weights or the plan with the checkpoint's.

    Raises:
        CheckpointError: it differs and `name` is not in `accepted`.
    """
    before = manifest["fingerprints"].get(name, fingerprint)  # absent in checkpoints that are older than the field
    if before != fingerprint:
        refuse([(name, before[:16], fingerprint[:16])], manifest["step"], accepted, warn=warn)


def refuse(changes: Sequence[tuple[str, Any, Any]], step: int, accepted: Sequence[str], *, warn: bool) -> None:
    """Raises CheckpointError for changes that were not accepted, warns about those that were."""
    refused = [change for change in changes if change[0] not in accepted]
    for name, old, new in changes:
        if name in accepted and warn:
            logger.warning("resuming at step %d with another %s (accepted): %r -> %r", step, name, old, new)
    if not refused:
        return
    explained = {
        DATA: "the groups, their tokens, images or pairs differ: the finished steps would not be this run's",
        WEIGHTS: "the base model's files differ: the trained weights belong to other frozen weights",
        PLUGIN: "the source of loss.plugin differs: its losses may be others",
        REFERENCE: "the log-probs of the reference are of another model or setting",
        PLAN: "the order of the groups in the finished steps differs: another version of the plan",
    }
    lines = [
        f"  {name}: {old!r} -> {new!r}" + (f" ({explained[name]})" if name in explained else "")
        for name, old, new in refused
    ]
    flag = "[" + ", ".join(f'"{name}"' for name, _, _ in refused) + "]"
    raise CheckpointError(
        f"the checkpoint of step {step} cannot be continued exactly; what differs (checkpoint -> this run):\n"
        + "\n".join(lines)
        + f"\nRevert it, or accept the change: --train.accept_changes '{flag}'. Free to change: number of ranks and "
        + ", ".join(ROUNDING + FREE)
    )


def content_digest(lines: Iterable[str]) -> str:
    """SHA-256 of lines, in order."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
