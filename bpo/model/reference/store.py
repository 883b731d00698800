"""The reference store: per-token log-probs (fp32) of the reference, by default the policy before its first step.

Entries are keyed by content (image bytes and token ids), so a changed record has no entry and is computed again. What
all entries depend on (weights, processor, dtype, code path) is the store's fingerprint and must match. See `format` for
its files. Shape letter: N response tokens.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from bpo.config.training import Config
from bpo.model.levers.install import choose_levers, rounding_facts
from bpo.model.load import ResolvedModel
from bpo.model.reference.fingerprint import DIGESTS, model_fingerprint
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
from bpo_kernels.dispatch import chosen_implementation

__all__ = [
    "ReferenceStore",
    "ReferenceStoreError",
    "matching_store",
    "model_fingerprint",
    "open_or_create",
    "other_reference",
    "run_fingerprint",
    "store_directory",
]

logger = logging.getLogger(__name__)

# Names of the implementations in the store format; they stay when the names in the code change.
_KERNELS_IN_STORES = {"triton": "triton", "plain": "reference"}


def store_directory(config: Config) -> Path:
    """The directory of a run's reference store."""
    return Path(config.train.reference_dir or Path(config.train.output_dir) / "reference")


def other_reference(config: Config) -> str:
    """`train.reference_model`; empty if the reference is `model.path`, the policy before its first step."""
    other = config.train.reference_model
    return "" if not other or os.path.realpath(other) == os.path.realpath(config.model.path) else other


def run_fingerprint(config: Config, model: ResolvedModel, directory: Path, reference: str = "") -> dict[str, str]:
    """Everything that a run's reference log-probs depend on, other than the records.

    Args:
        directory: The store, which caches digests of the model's files.
        reference: The reference, if it is not `model.path`.
    """
    # Another summation order rounds differently, and the first step compares policy and reference up to rounding.
    choice = model.attention
    settings: dict[str, str] = {"sequences": "separate"} if choice is None else {"attention": choice.backend}
    if config.data.min_pixels or config.data.max_pixels:
        settings["pixels"] = f"{config.data.min_pixels} to {config.data.max_pixels}"
    if config.data.image_aspect != "processor":  # the system prompt is in the keys: they cover all tokens
        settings["image_aspect"] = config.data.image_aspect
    settings |= rounding_facts(choose_levers(config, model))
    return model_fingerprint(
        reference or config.model.path,
        kept_digests=directory / DIGESTS,
        rehash=config.train.rehash_weights,
        dtype=str(model.dtype).removeprefix("torch."),
        vision_attention=config.model.vision_attention,
        kernels=_KERNELS_IN_STORES[chosen_implementation(torch.empty(0, device=model.device))],
        **settings,
    )


def matching_store(config: Config, model: ResolvedModel) -> ReferenceStore | None:
    """The existing store of `config`, to read; None if there is none, or if it is of another model or setting.

    Raises:
        ReferenceStoreError: the store has another format or is damaged.
    """
    directory = store_directory(config)
    if not (directory / "fingerprint.json").exists():
        return None
    fingerprint = run_fingerprint(config, model, directory)
    if differing := _differing(read_fingerprint(directory), fingerprint):
        logger.info("reference store %s not used, it was made for another %s", directory, ", ".join(differing))
        return None
    return ReferenceStore(directory, fingerprint)


def open_or_create(directory: Path, fingerprint: dict[str, str]) -> None:
    """Creates the store, or checks that an existing one matches this run. Called first, by one process of a job.

    Raises:
        ReferenceStoreError: the store has another format or fingerprint; names the fields that differ.
    """
    if not (directory / "fingerprint.json").exists():
        write_fingerprint(directory, fingerprint)
        return
    stored = read_fingerprint(directory)
    if differing := _differing(stored, fingerprint):
        lines = [f"  {_difference(name, stored.get(name), fingerprint.get(name))}" for name in differing]
        raise ReferenceStoreError(
            f"the reference store {directory} was made for another model or setting:\n"
            + "\n".join(lines)
            + "\nremove it, or set train.reference_dir to another directory"
        )


def _differing(stored: dict[str, str], now: dict[str, str]) -> list[str]:
    """The fields in which two fingerprints differ."""
    return sorted(name for name in stored.keys() | now.keys() if stored.get(name) != now.get(name))


def _difference(name: str, stored: str | None, now: str | None) -> str:
    """Describes the difference of one field of two fingerprints."""
    if not name.startswith("file:"):
        return f"{name}: {stored or 'not recorded'} in the store, {now or 'not recorded'} in this run"
    if stored and now:
        return f"{name}: content differs (SHA-256 {stored[:12]}... in the store, {now[:12]}... now)"
    return f"{name}: not in the model directory {'any more' if stored else 'when the store was created'}"


class ReferenceStore:
    """Reads all shards of a directory and appends to its own shard.

    Any number of processes and jobs may write concurrently, each to its own shard; an entry computed by two of them is
    stored twice and read once. A complete store is never written to. An entry takes 60 bytes of memory; values are
    mapped when the index is read, so they remain readable after a later `bpo refs compact`.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, str], rank: int = 0, label: str = ""):
        open_or_create(directory, fingerprint)
        self.directory = directory
        self.fingerprint = fingerprint
        self.label = label or f"rank{rank:05d}"  # of its shard
        self._writer: ShardWriter | None = None
        self._written: str | None = None
        self.reload()

    def reload(self, also: Iterable[str | None] = (), *, only: bool = False) -> list[str]:
        """Reads the index of every shard, ignoring unfinished entries of killed runs; returns the shards' names.

        Args:
            also: Names of shards that must exist, returned by other ranks' `close`: the directory listing of a network
                file system may be outdated.
            only: Read none but `also`.

        Raises:
            ReferenceStoreError: a shard belongs to another store, or one of `also` does not exist.
        """
        listed = () if only else index_files(self.directory)
        paths = sorted({*listed, *(self.directory / name for name in also if name)})
        try:
            shards = [read_shard(path, self.fingerprint) for path in paths]
        except FileNotFoundError as error:
            raise ReferenceStoreError(
                f"{error.filename}: shard not found; check that it was not removed and that every node has access to "
                f"{self.directory}, then restart: missing entries are computed"
            ) from error
        for shard in shards:
            if not shard.fits:
                raise ReferenceStoreError(
                    f"{shard.index}: belongs to another store (its header has another fingerprint or format); move it "
                    f"away, or run `bpo refs verify {self.directory} --remove-damaged`"
                )
        self._index = EntryIndex(shards)
        self._shards = shards
        self._values = [shard.map_values() for shard in shards]
        return [path.name for path in paths]

    def __contains__(self, key: str) -> bool:
        return bool(self.has([key])[0])

    def __len__(self) -> int:
        return len(self._index)

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Whether each key has an entry: booleans, in the order of the keys."""
        return self._index.rows([_key_bytes(key) for key in keys]) >= 0

    def put(self, key: str, logp_N: torch.Tensor) -> None:
        """Appends the log-probs of one group; durable within 30 s and after `close`, readable after `reload`.

        Raises:
            ReferenceStoreError: the disk is full or cannot be written; stored entries remain valid.
        """
        if self._writer is None:
            self._writer = ShardWriter(self.directory, self.fingerprint, self.label)
        self._writer.add(_key_bytes(key), logp_N.detach().to("cpu", torch.float32).numpy())
        self._written = self._writer.index.name

    def commit(self) -> str | None:
        """Makes the entries of this process durable, and readable after `reload`; returns the name of its shard."""
        if self._writer is not None:
            self._writer.commit()
        return self._written

    def close(self) -> str | None:
        """Closes this process's shard; returns its name, or None if nothing was written since the last `close`."""
        name, self._written = self._written, None
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        return name

    def get(self, key: str) -> torch.Tensor:
        """The fp32 log-probs of one group; raises as `gather` does."""
        return self.gather([key])

    def gather(self, keys: Sequence[str]) -> torch.Tensor:
        """The log-probs of a packed batch, in token order.

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
                f"{self._shards[shard].values}: entry {key[:12]} is damaged (checksum mismatch); run "
                f"`bpo refs verify {self.directory} --remove-damaged` and restart: it is computed again"
            )
        return values


def _key_bytes(key: str) -> bytes:
    raw = bytes.fromhex(key)
    if len(raw) != KEY_BYTES:
        raise ValueError(f"reference key {key!r}: {len(raw)} bytes, a SHA-256 has {KEY_BYTES}")
    return raw
