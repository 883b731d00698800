"""Fingerprint of reference log-probs: digests of weight and processor files, settings, and the code path."""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bpo.job.durable import file_digest
from bpo.model.reference.format import replace_file

CODE_PATH = "packed shared prefix, fp32 log-probs, v1"
DIGESTS = "digests.json"

# A file modified this recently could change again without a later modification time.
_CLOCK_GRAIN_NS = 2 * 10**9
_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py", ".gguf"}
logger = logging.getLogger(__name__)


class DigestCache:
    """Digests of files that are unchanged since they were hashed, cached in a small JSON file.

    A file counts as unchanged while path, size, modification time (ns) and inode are the same. Content that is replaced
    in place *with* the old size and time (`rsync --inplace --times`, a failing disk) is therefore not detected;
    `rehash` hashes every file again, which reads 26 GB for 13B parameters in 16 bits.

    Args:
        path: The JSON file, or None for no cache.
        rehash: Ignore cached digests.
    """

    def __init__(self, path: Path | None, rehash: bool = False):
        self.path = path
        self.known: dict[str, list[Any]] = {}
        if path is not None and path.exists() and not rehash:
            try:
                self.known = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not valid JSON ({error}); remove it: the files are hashed again") from error

    def digests(self, files: list[Path]) -> dict[Path, str]:
        """The SHA-256 of each file; uncached files are hashed, four at a time, and cached."""
        unknown = [file for file in files if self.known.get(_name(file), [None])[:-1] != _identity(file)]
        with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
            fresh = dict(zip(unknown, pool.map(_hash, unknown), strict=True))
        settled = {_name(file): entry for file, entry in fresh.items() if entry[1] < time.time_ns() - _CLOCK_GRAIN_NS}
        if settled and self.path is not None:
            self.known |= settled
            self._save(self.path)
        logger.info("weights and processor: hashed %d of %d files, the others are unchanged", len(fresh), len(files))
        return {file: (fresh.get(file) or self.known[_name(file)])[-1] for file in files}

    def _save(self, path: Path) -> None:
        if path.parent.exists() and not os.access(path.parent, os.W_OK):
            logger.info("%s is not writable: digests of the weights are not cached", path.parent)
            return
        replace_file(path, json.dumps(self.known, indent=1, sort_keys=True).encode())


def _name(file: Path) -> str:
    return str(file.resolve())  # hub snapshots are symlinks to blobs


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _hash(file: Path) -> list[Any]:
    """Size, modification time, inode and digest, in an order such that a change while reading makes the entry stale."""
    identity = _identity(file)
    return [*identity, file_digest(file)]


def model_fingerprint(
    path: str, *, kept_digests: Path | None = None, rehash: bool = False, **settings: str
) -> dict[str, str]:
    """Digests of the model's files, `settings` and the code path, by field. Files of a hub id: its local cache.

    Args:
        path: Directory or hub id of the model.
        kept_digests: JSON cache of digests of unchanged files; see `DigestCache` for the risk.
        rehash: Hash every file, ignoring cached digests.
        settings: Other settings that log-probs depend on, such as the dtype.
    """
    directory = Path(path)
    if not directory.is_dir():
        from transformers.utils import cached_file

        directory = Path(str(cached_file(path, "config.json"))).parent
    files = sorted(f for f in directory.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    digests = DigestCache(kept_digests, rehash).digests(files)
    return {**{f"file:{f.name}": digests[f] for f in files}, **settings, "code_path": CODE_PATH}
