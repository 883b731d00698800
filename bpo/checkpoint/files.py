"""Checkpoint files: written durably, hashed, renamed when complete, verified on load.

OUTPUT/checkpoints/step-00000010/
    rank-00000.safetensors ...  state of each rank: see `shards`
    manifest.json               step, ranks, cursor, fingerprints, versions, options; size and SHA-256 of each file
    manifest.sha256             SHA-256 of manifest.json, as `sha256sum -c` reads it
OUTPUT/checkpoints/latest       name of the latest one; for users and scripts, not used to resume
OUTPUT/checkpoints/best         name of the one with the best value of train.keep_best; retention never removes it

Other names in that folder: `*.tmp` is being written or removed, `*.replaced` gets replaced by a new one of its step,
`*.damaged` failed verification and was skipped. Nothing here depends on the clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bpo.job.collectives import Alone, Collectives
from bpo.job.durable import file_digest, sync_directory, sync_file, write_durably
from bpo.job.exits import JobError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 2
MANIFEST, MANIFEST_DIGEST, POINTER, BEST = "manifest.json", "manifest.sha256", "latest", "best"
# Stages of a save, in order; tests kill processes at each of them.
STAGES = ("temporary", "written", "hashed", "manifest", "renamed", "pointer", "retention")
Hook = Callable[[str], None]


class CheckpointError(JobError):
    """A checkpoint cannot be used or written; says why."""


def no_hook(stage: str) -> None:
    """The default of every `at_stage`."""


def checkpoints_root(output_dir: Path) -> Path:
    return output_dir / "checkpoints"


def step_dir(output_dir: Path, step: int) -> Path:
    return checkpoints_root(output_dir) / f"step-{step:08d}"


def checkpoint_dirs(output_dir: Path) -> list[Path]:
    """Finished checkpoints, latest first, verified or not."""
    found = checkpoints_root(output_dir).glob("step-*")
    return sorted((d for d in found if d.is_dir() and re.fullmatch(r"step-\d{8,}", d.name)), key=step_of, reverse=True)


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-").split(".")[0])


def seal_file(path: Path) -> dict[str, Any]:
    """Syncs a written file to disk and reads it back: its `bytes` and `sha256` for the manifest."""
    with path.open("rb") as file:
        sync_file(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def commit(temporary: Path, final: Path, manifest: dict[str, Any], at_stage: Hook = no_hook) -> None:
    """Turns a folder of sealed files into a checkpoint: manifest, rename, pointer, each durable before the next.

    Args:
        manifest: With `files`: name -> {bytes, sha256}.

    Raises:
        CheckpointError: a file of the manifest is missing or has another size (do all nodes share the file system?).
        OSError: the disk is full or cannot be written; `final` then does not exist.
    """
    for name, entry in manifest["files"].items():
        path = temporary / name
        found = path.stat().st_size if path.is_file() else "none"
        if found != entry["bytes"]:
            raise CheckpointError(
                f"{path}: its rank wrote {entry['bytes']} bytes, rank 0 finds {found}; is train.output_dir on a file "
                "system that all nodes share?"
            )
    text = json.dumps({"format": FORMAT, **manifest}, indent=1)
    write_durably(temporary / MANIFEST, text)
    write_durably(temporary / MANIFEST_DIGEST, _digest_line(text.encode()))
    sync_directory(temporary)
    at_stage("manifest")
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync_directory(final.parent)
    at_stage("renamed")
    write_durably(final.parent / POINTER, final.name)
    at_stage("pointer")
    shutil.rmtree(replaced, ignore_errors=True)


def _digest_line(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its digest.

    Raises:
        CheckpointError: it is missing, damaged, or has another format.
    """
    path, digest = directory / MANIFEST, directory / MANIFEST_DIGEST
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}: writing it was not finished")
    try:
        content = path.read_bytes()
        expected = digest.read_bytes() if digest.is_file() else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if expected != _digest_line(content).encode():
        if b'"format"' not in content:
            raise CheckpointError(f"{path} is damaged, or from an older version of bpo (format 1) without digests")
        raise CheckpointError(f"{path} is damaged: it does not match {MANIFEST_DIGEST}")
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {manifest['format']}; this version of bpo reads format {FORMAT}")
    if elsewhere := [name for name in manifest["files"] if name != Path(name).name]:
        raise CheckpointError(f"{path}: {elsewhere[0]!r} is not the name of a file in this folder")
    return manifest


def damaged_files(directory: Path, manifest: dict[str, Any], share: tuple[int, int] = (0, 1)) -> list[str]:
    """Problems of the files of a checkpoint, one line each; reads every byte.

    Args:
        share: (i, n) checks every n-th file from the i-th, so that ranks divide the work.
    """
    problems = []
    for name, entry in sorted(manifest["files"].items())[share[0] :: share[1]]:
        file = directory / name
        try:
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif file.stat().st_size != entry["bytes"]:
                problems.append(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
            elif file_digest(file) != entry["sha256"]:
                problems.append(f"{file} is damaged: its SHA-256 differs from the manifest")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error}")
    return problems


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Checks size and SHA-256 of every file of a checkpoint and returns its manifest.

    Raises:
        CheckpointError: names the files that are missing, truncated or changed.
    """
    manifest = read_manifest(directory)
    if problems := damaged_files(directory, manifest):
        raise CheckpointError("\n".join(problems))
    return manifest


def newest_valid_checkpoint(output_dir: Path, job: Collectives | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The latest valid checkpoint, or None if there is no checkpoint; damaged ones are logged and renamed.

    Called on all ranks: each hashes its share of the files, and all return the same result.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    job = job or Alone()
    names = job.gather([d.name for d in checkpoint_dirs(output_dir)] if job.rank == 0 else [])[0]
    problems: list[str] = []
    damaged: list[Path] = []
    for name in names:
        directory = checkpoints_root(output_dir) / name
        manifest, problem = job.gather(_try_manifest(directory) if job.rank == 0 else ({}, ""))[0]
        found = [problem] if problem else []
        if not found:
            shares = job.gather(damaged_files(directory, manifest, (job.rank, job.world_size)))
            found = [line for share in shares for line in share]
        if not found:
            if job.rank == 0:
                for other in damaged:
                    _set_aside(other)
                _repair_pointer(directory)
            job.gather(None)  # no rank writes before the renames are done
            return directory, manifest
        problems += found
        damaged.append(directory)
        if job.rank == 0:
            logger.error("checkpoint %s skipped: %s", name, "; ".join(found))
    if problems:
        raise CheckpointError(f"no checkpoint in {checkpoints_root(output_dir)} is valid:\n  " + "\n  ".join(problems))
    return None


def latest_valid(output_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The latest valid checkpoint, for readers: changes nothing in the directory, whose run may be going on.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for directory in checkpoint_dirs(output_dir):
        try:
            return directory, verify_checkpoint(directory)
        except CheckpointError as error:
            logger.error("checkpoint %s skipped: %s", directory.name, error)
            problems.append(str(error))
    raise CheckpointError("\n".join(problems) or f"{checkpoints_root(output_dir)} contains no checkpoint")


def finished_step(output_dir: Path) -> tuple[int, int] | None:
    """(steps done, steps planned) of the latest checkpoint whose manifest and file sizes are right, or None.

    For a quick look: no weights are read, and nothing is changed.
    """
    for directory in checkpoint_dirs(output_dir):
        with contextlib.suppress(CheckpointError, OSError):
            manifest = read_manifest(directory)
            if all((directory / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items()):
                return manifest["cursor"]["steps_done"], manifest["cursor"]["steps_planned"]
    return None


def _try_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_manifest(directory), ""
    except CheckpointError as error:
        return {}, str(error)


def _set_aside(directory: Path) -> None:
    """Renames a damaged checkpoint: retention counts valid ones only, and the name is free for its step."""
    aside, number = directory.with_name(directory.name + ".damaged"), 1
    while aside.exists():
        number += 1
        aside = directory.with_name(f"{directory.name}.damaged-{number}")
    os.replace(directory, aside)
    logger.warning("%s was renamed to %s; remove it once you have inspected it", directory, aside.name)


def _repair_pointer(newest: Path) -> None:
    pointer = newest.parent / POINTER
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    if named == newest.name:
        return
    state = "missing" if named is None else f"`{named}`" if named else "empty"
    logger.warning("%s was %s; updated to the latest valid checkpoint, %s", pointer, state, newest.name)
    write_durably(pointer, newest.name)


def clean_leftovers(output_dir: Path) -> None:
    """Removes the unfinished saves of a killed job. Only the job that holds the run's lock may call it."""
    root = checkpoints_root(output_dir)
    for replaced in sorted(root.glob("step-*.replaced")):
        final = replaced.with_suffix("")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, final)
    for unfinished in sorted(root.glob("step-*.tmp")):
        logger.warning("%s: removed an unfinished save", unfinished)
        shutil.rmtree(unfinished)
    for pointer in (POINTER, BEST):
        for temporary in root.glob(f".{pointer}.*.tmp"):
            temporary.unlink()


def follow_pointer(path: Path) -> Path:
    """The checkpoint that `checkpoints/best` or `checkpoints/latest` names; any other path unchanged."""
    is_pointer = path.name in (POINTER, BEST) and path.is_file()
    return path.with_name(path.read_text(encoding="utf-8").strip()) if is_pointer else path


def best_step(output_dir: Path) -> int | None:
    """The step that `checkpoints/best` names; None if there is no such file or checkpoint."""
    best = follow_pointer(checkpoints_root(output_dir) / BEST)
    return step_of(best) if best in checkpoint_dirs(output_dir) else None


def mark_best(output_dir: Path, step: int) -> None:
    """Names the finished checkpoint of `step` in `checkpoints/best`."""
    write_durably(checkpoints_root(output_dir) / BEST, step_dir(output_dir, step).name)


def superseded(steps: Sequence[int], keep_last: int, keep_every: int) -> list[int]:
    """Steps whose checkpoints to remove: not the last `keep_last` (0: keep all), no multiples of `keep_every`."""
    if keep_last == 0:
        return []
    old = sorted(steps)[:-keep_last]
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def apply_retention(output_dir: Path, keep_last: int, keep_every: int) -> None:
    """Removes superseded checkpoints, oldest first, but not the best; logs those that cannot be removed."""
    by_step = {step_of(directory): directory for directory in checkpoint_dirs(output_dir)}
    best = best_step(output_dir)
    for step in superseded(list(by_step), keep_last, keep_every):
        if step == best:
            continue
        going = by_step[step].with_name(by_step[step].name + ".old.tmp")
        try:
            os.replace(by_step[step], going)  # so that a partly removed checkpoint is never listed
            shutil.rmtree(going)
        except OSError as error:
            logger.warning("%s is superseded but cannot be removed: %s", by_step[step], error)


def remove_unfinished(temporary: Path) -> None:
    """Removes the files of a failed save to free disk space."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(temporary)
