"""Fingerprint of reference log-probs: digests of weight and processor files, settings, and the code path."""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bpo.config.adapter import CONFIG_FILE, WEIGHTS_FILE, base_of, is_adapter
from bpo.config.training import missing_model
from bpo.job.durable import file_digest
from bpo.model.reference.format import replace_file

CODE_PATH = "packed shared prefix, fp32 log-probs, v1"
DIGESTS = "digests.json"

# A file modified this recently could change again without a later modification time.
_CLOCK_GRAIN_NS = 2 * 10**9
# In the order in which transformers looks for them; an index names its shards.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_CONFIGS = (
    "config.json generation_config.json preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.json chat_template.jinja "
    "chat_template.json adapter_config.json adapter_model.safetensors adapter_model.bin"
).split()
_VOCABULARIES = (
    "tokenizer.model spiece.model sentencepiece.model sentencepiece.bpe.model spm.model source.spm target.spm "
    "vocab.json vocab.txt merges.txt dict.txt bpe.codes normalizer.json"
).split()
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
            stored = _json(path)
            self.known = {name: entry for name, entry in stored.items() if _is_entry(entry)}
            if not stored or len(self.known) < len(stored):
                logger.warning("%s: unreadable entries; the files that they name are hashed again", path)

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


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and list(map(type, entry)) == [int, int, int, str]


def _name(file: Path) -> str:
    return str(file.resolve())  # hub snapshots are symlinks to blobs


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _hash(file: Path) -> list[Any]:
    """Size, modification time, inode and digest, in an order such that a change while reading makes the entry stale."""
    identity = _identity(file)
    return [*identity, file_digest(file)]


def weight_files(directory: Path) -> list[Path]:
    """The files from which transformers reads the weights: the index first, shards in order; some may be missing."""
    explicit = _json(directory / "config.json").get("transformers_weights")
    found = next((name for name in (explicit, *_WEIGHTS) if name and (directory / name).is_file()), None)
    if found is None:
        return []
    shards = set(_json(directory / found).get("weight_map", {}).values()) if found.endswith(".json") else set()
    return [directory / found, *(directory / str(shard) for shard in sorted(shards))]


def loaded_files(directory: Path) -> list[Path]:
    """The files of a model directory that transformers loads; any other may change without an effect on the model."""
    files = {file for file in weight_files(directory) if file.is_file()}
    files |= {file for name in (*_CONFIGS, *_VOCABULARIES) if (file := directory / name).is_file()}
    if any("auto_map" in _json(file) for file in files if file.name.endswith("config.json")):
        # The model's own code, which may read any text or vocabulary beside it.
        files |= {f for f in directory.iterdir() if f.suffix in (".py", ".model", ".txt", ".tiktoken") and f.is_file()}
    return sorted(files)


def adapter_files(directory: Path) -> list[Path]:
    """The files of an adapter directory that are loaded; its processor is that of the base."""
    return [file for name in (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin") if (file := directory / name).is_file()]


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, which loading reports."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def model_fingerprint(
    path: str, *, kept_digests: Path | None = None, rehash: bool = False, **settings: str
) -> dict[str, str]:
    """Digests of the model's files, `settings` and the code path, by field. Files of a hub id: its local cache.

    The files of an adapter are fields of their own, beside those of its base.

    Args:
        path: Directory or hub id of the model, or directory of an adapter.
        kept_digests: JSON cache of digests of unchanged files; see `DigestCache` for the risk.
        rehash: Hash every file, ignoring cached digests.
        settings: Other settings that log-probs depend on, such as the dtype.

    Raises:
        ValueError: the directory is gone, or has no config.json.
    """
    if fault := missing_model(path):
        raise ValueError(f"model.path is {path!r}: {fault}")
    adapted = {f"adapter/{file.name}": file for file in adapter_files(Path(path))} if is_adapter(path) else {}
    directory = Path(base_of(path) if adapted else path)
    if not directory.is_dir():
        from transformers.utils import cached_file

        directory = Path(str(cached_file(str(directory), "config.json"))).parent
    files = {file.name: file for file in loaded_files(directory)} | adapted
    digests = DigestCache(kept_digests, rehash).digests(list(files.values()))
    return {**{f"file:{name}": digests[f] for name, f in files.items()}, **settings, "code_path": CODE_PATH}
