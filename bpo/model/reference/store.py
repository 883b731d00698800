"""The reference store: per-token log-probs (fp32) of the policy before its first step.

Entries are addressed by content (image bytes and token ids), so a changed record is simply missing and computed anew.
What holds for all entries (weights, processor, dtype, code path) is the store's fingerprint and must match. Its files
are described in `format`. Shape letter: N response tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from bpo.model.reference.fingerprint import file_digest, model_fingerprint
from bpo.model.reference.format import (
    KEY_BYTES,
    ReferenceStoreError,
    ShardWriter,
    index_files,
    read_fingerprint,
    read_shard,
    write_fingerprint,
)
from bpo.model.reference.index import EntryIndex

__all__ = ["ReferenceStore", "ReferenceStoreError", "file_digest", "model_fingerprint", "open_or_create"]


def open_or_create(directory: Path, fingerprint: dict[str, str]) -> None:
    """Makes the store if there is none, else checks that it is this run's. One process of a job calls it, first.

    Raises:
        ReferenceStoreError: the store has another format, or another fingerprint: says which fields differ.
    """
    if not (directory / "fingerprint.json").exists():
        write_fingerprint(directory, fingerprint)
        return
    stored = read_fingerprint(directory)
    differing = sorted(k for k in stored.keys() | fingerprint.keys() if stored.get(k) != fingerprint.get(k))
    if differing:
        lines = [f"  {_difference(name, stored.get(name), fingerprint.get(name))}" for name in differing]
        raise ReferenceStoreError(
            f"the reference store {directory} was made for another model or setting:\n"
            + "\n".join(lines)
            + "\nremove it, or give train.reference_dir another directory"
        )


def _difference(name: str, stored: str | None, now: str | None) -> str:
    """One field of two fingerprints in words."""
    if not name.startswith("file:"):
        return f"{name}: {stored or 'not recorded'} in the store, {now or 'not recorded'} in this run"
    if stored and now:
        return f"{name}: another content (SHA-256 {stored[:12]}... in the store, {now[:12]}... now)"
    return f"{name}: {'no longer beside the model' if stored else 'not beside the model when the store was made'}"


class ReferenceStore:
    """Reads all shards of a directory, appends to a shard of its own.

    Any number of processes and jobs may write at once, each its own shard; an entry that two of them computed is kept
    twice and read once. A store that lacks nothing is never written to. In memory an entry takes 60 bytes; the values
    are mapped when the index is read, so that a `bpo refs compact` afterwards takes nothing away.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, str], rank: int = 0):
        open_or_create(directory, fingerprint)
        self.directory = directory
        self.fingerprint = fingerprint
        self.rank = rank
        self._writer: ShardWriter | None = None
        self._written: str | None = None
        self.reload()

    def reload(self, also: Iterable[str | None] = ()) -> None:
        """Reads the index of every shard, without what a killed run left unfinished.

        Args:
            also: Names of shards that must be there, as other ranks' `close` returned them: the listing of a network
                file system may be older than they are.

        Raises:
            ReferenceStoreError: a shard belongs to another store, or one of `also` is not there.
        """
        paths = sorted({*index_files(self.directory), *(self.directory / name for name in also if name)})
        try:
            shards = [read_shard(path, self.fingerprint) for path in paths]
        except FileNotFoundError as error:
            raise ReferenceStoreError(
                f"{error.filename}: a shard of the store is not there; was it removed, or does "
                f"every node see {self.directory}? Start again: what is missing is computed"
            ) from error
        for shard in shards:
            if not shard.fits:
                raise ReferenceStoreError(
                    f"{shard.index}: was not written for this store (its header names another fingerprint or format); "
                    f"move it away, or run `bpo refs verify {self.directory} --remove-damaged`"
                )
        self._index = EntryIndex(shards)
        self._shards = shards
        self._values = [shard.map_values() for shard in shards]

    def __contains__(self, key: str) -> bool:
        return bool(self.has([key])[0])

    def __len__(self) -> int:
        return len(self._index)

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Which of the keys have an entry: booleans, in their order."""
        return self._index.rows([_key_bytes(key) for key in keys]) >= 0

    def put(self, key: str, logp_N: torch.Tensor) -> None:
        """Appends the log-probs of one group; durable within half a minute and after `close`, readable after `reload`.

        Raises:
            ReferenceStoreError: the disk is full or cannot be written; what was stored before stays valid.
        """
        if self._writer is None:
            self._writer = ShardWriter(self.directory, self.fingerprint, f"rank{self.rank:05d}")
        self._writer.add(_key_bytes(key), logp_N.detach().to("cpu", torch.float32).numpy())
        self._written = self._writer.index.name

    def close(self) -> str | None:
        """Ends this process's shard; returns its name, or None if it wrote nothing since the last `close`."""
        name, self._written = self._written, None
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        return name

    def get(self, key: str) -> torch.Tensor:
        """The fp32 log-probs of one group; raises as `gather` does."""
        return self.gather([key])

    def gather(self, keys: Sequence[str]) -> torch.Tensor:
        """The log-probs of a packed batch, in its order of tokens.

        Raises:
            KeyError: the store has no such entry.
            ReferenceStoreError: the values are damaged.
        """
        rows = self._index.rows([_key_bytes(key) for key in keys]).tolist()
        return torch.from_numpy(np.concatenate([self._checked(k, r) for k, r in zip(keys, rows, strict=True)]))

    def _checked(self, key: str, row: int) -> np.ndarray:
        if row < 0:
            raise KeyError(key)
        index = self._index
        shard, start, count = int(index.shard_E[row]), int(index.offset_E[row]), int(index.count_E[row])
        values = self._values[shard][start : start + count]
        if zlib.crc32(values.data) != index.crc_E[row]:
            raise ReferenceStoreError(
                f"{self._shards[shard].values}: entry {key[:12]} is damaged (checksum differs); run "
                f"`bpo refs verify {self.directory} --remove-damaged` and start again: it is computed anew"
            )
        return values


def _key_bytes(key: str) -> bytes:
    raw = bytes.fromhex(key)
    if len(raw) != KEY_BYTES:
        raise ValueError(f"reference key {key!r}: {len(raw)} bytes, a SHA-256 has {KEY_BYTES}")
    return raw
