"""The reference store: per-token log-probs (fp32) of the policy before its first step.

Entries are addressed by content (image bytes and token ids), so a changed record is simply missing and computed anew.
What holds for all entries (weights, processor, dtype, code path) is the store's fingerprint and must match.

    DIR/fingerprint.json     what the log-probs depend on
    DIR/RANK-RUN.jsonl       one line an entry: key, offset and count in the file beside it, CRC of the values
    DIR/RANK-RUN.f32         the values, little-endian fp32
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

CODE_PATH = "packed shared prefix, fp32 log-probs, v1"


class ReferenceStoreError(ValueError):
    """The store does not fit the run; the message says in which field."""


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def model_fingerprint(path: str, **settings: str) -> dict[str, str]:
    """What reference log-probs depend on besides the records: every weight and processor file, `settings`, code path.

    For a hub id the files are those of the local cache.
    """
    directory = Path(path)
    if not directory.is_dir():
        from transformers.utils import cached_file

        directory = Path(str(cached_file(path, "config.json"))).parent
    suffixes = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py", ".gguf"}
    files = sorted(f for f in directory.iterdir() if f.suffix in suffixes and f.is_file())
    fingerprint = {f"file:{f.name}": file_digest(f) for f in files}
    return {**fingerprint, **settings, "code_path": CODE_PATH}


class ReferenceStore:
    """Reads all shards of a directory, appends to a shard of its own."""

    def __init__(self, directory: Path, fingerprint: dict[str, str], rank: int = 0):
        self.directory = directory
        self.rank = rank
        self._index: dict[str, tuple[Path, int, int, int]] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self._writer: tuple[Any, Any] | None = None
        self._check_fingerprint(fingerprint)
        self.reload()

    def _check_fingerprint(self, fingerprint: dict[str, str]) -> None:
        path = self.directory / "fingerprint.json"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{self.rank}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(fingerprint, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(temporary, path)
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(k for k in stored.keys() | fingerprint.keys() if stored.get(k) != fingerprint.get(k))
        if differing:
            lines = [f"  {k}: store has {stored.get(k)}, this run has {fingerprint.get(k)}" for k in differing]
            raise ReferenceStoreError(
                f"the reference store {self.directory} was made for another model or setting:\n"
                + "\n".join(lines)
                + "\nremove it, or give train.reference_dir another directory"
            )

    def reload(self) -> None:
        """Reads the index of every shard; a torn last line or value block of a killed run is left out."""
        self._index.clear()
        self._maps.clear()
        for index_file in sorted(self.directory.glob("*.jsonl")):
            values = index_file.with_suffix(".f32")
            available = values.stat().st_size // 4 if values.exists() else 0
            for line in index_file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line a killed process did not finish: its entry is computed again
                if entry["offset"] + entry["count"] <= available:
                    self._index[entry["key"]] = (values, entry["offset"], entry["count"], entry["crc"])

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def put(self, key: str, logp_N: torch.Tensor) -> None:
        """Appends the log-probs of one group; durable after `close`."""
        values = logp_N.detach().to("cpu", torch.float32).numpy().astype("<f4")
        if self._writer is None:
            stem = self.directory / f"rank{self.rank:05d}-{os.getpid()}-{os.urandom(3).hex()}"
            self._writer = (stem.with_suffix(".f32").open("wb"), stem.with_suffix(".jsonl").open("w", encoding="utf-8"))
        data, index = self._writer
        raw = values.tobytes()
        entry = {"key": key, "offset": data.tell() // 4, "count": len(values), "crc": zlib.crc32(raw)}
        data.write(raw)
        data.flush()  # values reach the file before the line that points at them
        index.write(json.dumps(entry) + "\n")
        index.flush()

    def close(self) -> None:
        for file in self._writer or ():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._writer = None

    def get(self, key: str) -> torch.Tensor:
        """The fp32 log-probs of one group.

        Raises:
            KeyError: the store has no such entry.
            ReferenceStoreError: the values are damaged.
        """
        path, offset, count, crc = self._index[key]
        if path not in self._maps:
            # Whole values only: a killed process may have left part of one at the end.
            self._maps[path] = np.memmap(path, dtype="<f4", mode="r", shape=(path.stat().st_size // 4,))
        values = np.array(self._maps[path][offset : offset + count])
        if zlib.crc32(values.tobytes()) != crc:
            raise ReferenceStoreError(f"{path}: entry {key[:12]} is damaged (checksum differs); remove the store")
        return torch.from_numpy(values)

    def gather(self, keys: Sequence[str]) -> torch.Tensor:
        """The log-probs of a packed batch, in its order of tokens."""
        return torch.cat([self.get(key) for key in keys])
