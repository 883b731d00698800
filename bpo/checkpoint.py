"""Checkpoints: written beside, verified by a manifest, moved into place at once; resume; the newest valid one.

OUTPUT/checkpoints/step-00000010/
    deepspeed/                 optimizer and trainable weights, a file a rank
    trainable.safetensors      what was trained, whole; `bpo export` reads it
    manifest.json              step, world size, versions, size and SHA-256 of every file
OUTPUT/checkpoints/latest      name of the newest one
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from bpo.engine import TrainingEngine, barrier
from bpo.model.reference import file_digest
from bpo.run_record import versions

logger = logging.getLogger(__name__)
_TAG = "deepspeed"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; names what is wrong with it."""


def save_checkpoint(engine: TrainingEngine, output_dir: Path, step: int, config: dict[str, Any]) -> Path:
    """Writes a checkpoint on all ranks; it gets its name only when every file is on disk and hashed.

    Args:
        config: The run's resolved configuration; export reads it.
    """
    root = output_dir / "checkpoints"
    final, temporary = root / f"step-{step:08d}", root / f"step-{step:08d}.tmp"
    if engine.ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    engine.deepspeed.save_checkpoint(
        str(temporary), tag=_TAG, save_latest=False, exclude_frozen_parameters=True, client_state={"step": step}
    )
    trainable = engine.gathered_trainable_state()
    if engine.ranks.is_main:
        save_file(trainable, temporary / "trainable.safetensors", metadata={"format": "pt"})
    barrier()
    if engine.ranks.is_main:
        manifest = {
            "step": step,
            "world_size": engine.ranks.world_size,
            "versions": versions(),
            "config": config,
            "files": _hash_files(temporary),
        }
        _write_durably(temporary / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _write_durably(root / "latest", final.name)
        logger.info("saved %s", final)
    barrier()
    return final


def _hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    return files


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has the size and SHA-256 it was written with.

    Raises:
        CheckpointError: names the file that is missing, cut or changed.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no manifest.json: it was not written to the end")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    for name, (num_bytes, sha256) in expected.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {num_bytes}")
        if file_digest(file) != sha256:
            raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest")
    return manifest


def checkpoint_dirs(output_dir: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    found = (output_dir / "checkpoints").glob("step-*")
    return sorted((d for d in found if d.is_dir() and d.suffix != ".tmp"), reverse=True)


def newest_valid_checkpoint(output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies; a damaged one is named aloud and passed over. None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
    """
    problems = []
    for directory in checkpoint_dirs(output_dir):
        try:
            return directory, verify_checkpoint(directory)
        except CheckpointError as error:
            problems.append(str(error))
            logger.error("checkpoint passed over: %s", error)
    if problems:
        raise CheckpointError(f"no checkpoint in {output_dir / 'checkpoints'} can be used:\n  " + "\n  ".join(problems))
    return None


def find_resumable(output_dir: Path, *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, or None for a fresh start.

    Raises:
        CheckpointError: there are checkpoints but the run was not asked to continue: a fresh start would mix with them.
    """
    if resume:
        found = newest_valid_checkpoint(output_dir)
        if found is None:
            logger.warning("--resume: no checkpoint in %s yet; starting at step 0", output_dir / "checkpoints")
        return found
    if checkpoint_dirs(output_dir):
        raise CheckpointError(
            f"{output_dir} holds checkpoints of an earlier run; give --resume or another train.output_dir"
        )
    return None


def resume(engine: TrainingEngine, directory: Path, manifest: dict[str, Any]) -> int:
    """Loads weights and optimizer of a verified checkpoint; returns the number of steps that are done.

    Raises:
        CheckpointError: it was written by another number of ranks.
    """
    if manifest["world_size"] != engine.ranks.world_size:
        raise CheckpointError(
            f"{directory} was written by {manifest['world_size']} ranks; this run has {engine.ranks.world_size}. "
            "Resume with the same number"
        )
    loaded, _ = engine.deepspeed.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {directory / _TAG}")
    return int(manifest["step"])
