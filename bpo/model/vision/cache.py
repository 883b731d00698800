"""Features that are kept on the host or on disk, by the digest of their image.

    DIR/DIGEST/fingerprint.json   what features depend on, other than the image; DIGEST is that of its content
    DIR/DIGEST/NAME.values        features, each with its shape in front
    DIR/DIGEST/NAME.index         one record per entry

The files of NAME are those of a reference store (`bpo.model.reference.format`): one writer, which only appends, values
on disk before their record, checksums. Several ranks and runs may share DIR. Shape letters: as in `tower`.
"""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bpo.job.durable import write_durably
from bpo.model.reference.format import ShardWriter, fingerprint_digest, index_files, read_shard

logger = logging.getLogger(__name__)

# int32 words in front of the features: number of dimensions, then their sizes.
_SHAPE_WORDS = 8
# Entries of other ranks and runs are looked up again after this time; a twentieth of the time at most.
_RESCAN_S, _RESCAN_SHARE = 30.0, 0.05


class FeatureCache(Protocol):
    """Keeps features [K, R, ..., D] on the host; may refuse any."""

    def get(self, key: str) -> torch.Tensor | None: ...

    def put(self, key: str, features: torch.Tensor) -> None: ...

    def close(self) -> None: ...


class _Room:
    """Bytes that may still be added; says once when they are used up."""

    def __init__(self, room_bytes: float, where: str):
        self._left, self._where, self._said = room_bytes, where, False

    def take(self, num_bytes: int) -> bool:
        if num_bytes <= self._left:
            self._left -= num_bytes
            return True
        if not self._said:
            logger.warning(
                "%s is full: features of further images are computed again; raise vision.cache_gb", self._where
            )
        self._said = True
        return False


class MemoryCache:
    """Features in the memory of this process.

    Not page-locked: PyTorch rounds such memory up to powers of two, and one copy takes less time than it saves.
    """

    def __init__(self, room_bytes: float):
        self._kept: dict[str, torch.Tensor] = {}
        self._room = _Room(room_bytes, "the cache of features in memory")

    def get(self, key: str) -> torch.Tensor | None:
        return self._kept.get(key)

    def put(self, key: str, features: torch.Tensor) -> None:
        if key not in self._kept and self._room.take(features.nbytes):
            self._kept[key] = features.cpu()

    def close(self) -> None:
        self._kept.clear()


class DiskCache:
    """Features in a directory that ranks and runs share, each with its own shard.

    Entries are on disk within 30 s and after `close`. A damaged one counts as missing, with one warning.

    Args:
        directory: `vision.cache_dir`; entries of other fingerprints in it stay as they are.
        fingerprint: What features depend on, other than the image.
        dtype: Of features.
        room_bytes: Size limit of `directory`, of which each of `world_size` ranks may add its share.

    Raises:
        ValueError: The directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: dict[str, str],
        dtype: torch.dtype,
        room_bytes: float,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._directory = directory / fingerprint_digest(fingerprint).hex()[:16]
        self._fingerprint, self._dtype = fingerprint, dtype
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            described = json.dumps(fingerprint, indent=1, sort_keys=True)
            write_durably(self._directory / "fingerprint.json", described)
        except OSError as error:
            raise ValueError(
                f"{self._directory}: {error.strerror}; set vision.cache_dir to a writable folder"
            ) from error
        used = sum(file.stat().st_size for file in directory.glob("*/*.values"))
        self._room = _Room((room_bytes - used) / world_size, str(directory))
        self._writer = ShardWriter(self._directory, fingerprint, f"rank{rank:05d}", "vision.cache_dir")
        self._written: set[bytes] = set()
        self._warned: set[str] = set()
        self._scan()

    def _scan(self) -> None:
        """Reads the index of every shard, without unfinished entries of killed runs."""
        started = time.monotonic()
        self._values: list[np.ndarray] = []
        self._files: list[Path] = []
        self._places: dict[bytes, list[tuple[int, int, int, int]]] = {}
        for index in index_files(self._directory):
            shard = read_shard(index, self._fingerprint)
            if not shard.fits:
                self._warn(f"{index}: belongs to another model or is damaged, and is not read; remove it")
                continue
            columns = (shard.records_E[name].tolist() for name in ("offset", "count", "crc"))
            for key, *place in zip(map(bytes, shard.records_E["key"]), *columns, strict=True):
                self._places.setdefault(key, []).append((len(self._values), *place))
            self._values.append(shard.map_values())
            self._files.append(shard.values)
        self._scanned = time.monotonic()
        self._scan_pause = (self._scanned - started) / _RESCAN_SHARE

    def get(self, key: str) -> torch.Tensor | None:
        raw = bytes.fromhex(key)
        if raw not in self._places:
            pause = self._scan_pause if raw in self._written else max(_RESCAN_S, self._scan_pause)
            if time.monotonic() >= self._scanned + pause:
                self._writer.commit()
                self._scan()
        for shard, offset, count, crc in self._places.get(raw, ()):
            values = np.array(self._values[shard][offset : offset + count])
            if zlib.crc32(values.data) == crc:
                return _from_words(values, self._dtype)
            self._warn(f"{self._files[shard]}: damaged features are computed again (the first: {key[:12]})")
        return None

    def put(self, key: str, features: torch.Tensor) -> None:
        """Adds an entry.

        Raises:
            ReferenceStoreError: The disk is full or cannot be written; stored entries remain valid.
        """
        raw = bytes.fromhex(key)
        if raw in self._written or not self._room.take(features.nbytes + 4 * _SHAPE_WORDS):
            return
        self._written.add(raw)
        self._writer.add(raw, _to_words(features.cpu()))

    def close(self) -> None:
        self._writer.close()

    def _warn(self, message: str) -> None:
        """Warns once per file."""
        file = message.split(":")[0]
        if file not in self._warned:
            logger.warning("%s", message)
        self._warned.add(file)


def _to_words(features: torch.Tensor) -> np.ndarray:
    """The shape and the bytes of a tensor as fp32 words, which the file keeps bit for bit."""
    shape = np.zeros(_SHAPE_WORDS, dtype="<i4")
    shape[: features.dim() + 1] = [features.dim(), *features.shape]
    content = features.contiguous().flatten().view(torch.uint8).numpy()
    padding = np.zeros(-len(content) % 4, dtype=np.uint8)
    return np.concatenate([shape.view(np.uint8), content, padding]).view("<f4")


def _from_words(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    size, *shape = words[:_SHAPE_WORDS].view("<i4").tolist()
    content = torch.from_numpy(words[_SHAPE_WORDS:]).view(dtype)
    return content[: math.prod(shape[:size])].view(shape[:size])
