"""What reference log-probs depend on besides the records: every weight and processor file, the settings, the code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bpo.model.reference.format import replace_file

CODE_PATH = "packed shared prefix, fp32 log-probs, v1"
DIGESTS = "digests.json"

# A file written to within this time of its last known change could change again without a later modification time.
_CLOCK_GRAIN_NS = 2 * 10**9
_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py", ".gguf"}
logger = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class DigestCache:
    """Digests of files that have not changed since they were hashed, kept in a small JSON file.

    A file counts as unchanged while path, size, modification time (ns) and inode are the same. The price: content that
    is exchanged in place *and* given back its old size and time (`rsync --inplace --times`, a failing disk) goes
    unnoticed; `rehash` hashes every file again, which reads 26 GB for 13B parameters in 16 bits.

    Args:
        path: The JSON file, or None to keep nothing.
        rehash: Believe nothing that is kept.
    """

    def __init__(self, path: Path | None, rehash: bool = False):
        self.path = path
        self.known: dict[str, list[Any]] = {}
        if path is not None and path.exists() and not rehash:
            try:
                self.known = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not valid JSON ({error}); remove it: the files are hashed anew") from error

    def digests(self, files: list[Path]) -> dict[Path, str]:
        """The SHA-256 of each file; the unknown are hashed, four at a time, and remembered."""
        unknown = [file for file in files if self.known.get(_name(file), [None])[:-1] != _identity(file)]
        with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
            fresh = dict(zip(unknown, pool.map(_hash, unknown), strict=True))
        settled = {_name(file): entry for file, entry in fresh.items() if entry[1] < time.time_ns() - _CLOCK_GRAIN_NS}
        if settled and self.path is not None:
            self.known |= settled
            self._save(self.path)
        logger.info("weights and processor: %d of %d files hashed, the others are unchanged", len(fresh), len(files))
        return {file: (fresh.get(file) or self.known[_name(file)])[-1] for file in files}

    def _save(self, path: Path) -> None:
        if path.parent.exists() and not os.access(path.parent, os.W_OK):
            logger.info("%s cannot be written: the digests of the weights are not kept", path.parent)
            return
        replace_file(path, json.dumps(self.known, indent=1, sort_keys=True).encode())


def _name(file: Path) -> str:
    return str(file.resolve())  # a hub snapshot is links into a store of blobs


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _hash(file: Path) -> list[Any]:
    """Size, modification time, inode and digest, taken so that a change while reading makes the entry stale."""
    identity = _identity(file)
    return [*identity, file_digest(file)]


def model_fingerprint(
    path: str, *, kept_digests: Path | None = None, rehash: bool = False, **settings: str
) -> dict[str, str]:
    """Digests of the model's files, `settings` and the code path, by field. For a hub id: the files of the local cache.

    Args:
        path: Directory or hub id of the model.
        kept_digests: JSON file that spares hashing unchanged files; see `DigestCache` for what that risks.
        rehash: Hash every file all the same.
        settings: What else log-probs depend on, such as the dtype.
    """
    directory = Path(path)
    if not directory.is_dir():
        from transformers.utils import cached_file

        directory = Path(str(cached_file(path, "config.json"))).parent
    files = sorted(f for f in directory.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    digests = DigestCache(kept_digests, rehash).digests(files)
    return {**{f"file:{f.name}": digests[f] for f in files}, **settings, "code_path": CODE_PATH}
