"""File format and durability of a reference store; uses only numpy, so that `bpo refs` needs no torch.

    DIR/fingerprint.json   the format, and the fingerprint of everything that log-probs depend on
    DIR/NAME.values        log-probs, little-endian fp32
    DIR/NAME.index         a header with the fingerprint's digest, then one record of 52 bytes per entry
    DIR/digests.json       SHA-256 of the model's files, for `fingerprint`

A shard (the two files of one NAME) has one writer, which only appends. Values are synced to disk before the records
that reference them, and each record has its own checksum, so a partial write at the end of either file is detected and
ignored. Shape letter: E entries.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bpo.job.durable import sync_directory, sync_file, write_durably

FORMAT = 2
KEY_BYTES = 32
MAGIC = b"BPOREF2\n"
HEADER_BYTES = len(MAGIC) + 32

# offset and count are in values, not bytes; `crc` covers the values' bytes, `own_crc` the preceding fields.
RECORD = np.dtype(
    [("key", "u1", (KEY_BYTES,)), ("offset", "<u8"), ("count", "<u4"), ("crc", "<u4"), ("own_crc", "<u4")]
)
_SIGNED_BYTES = RECORD.itemsize - 4

# A killed pass loses the entries since its last commit; a commit costs two fsyncs.
COMMIT_EVERY_S = 30.0
COMMIT_BYTES = 64 << 20


class ReferenceStoreError(ValueError):
    """The store does not match the run, is damaged or cannot be written; the message names the file and the fix."""


@dataclass(frozen=True)
class Shard:
    """One shard as read from disk.

    Attributes:
        index: The index file; the values file is in the same directory.
        fits: The header is complete and has the store's fingerprint; otherwise no record is read.
        records_E: The valid records (`RECORD`) whose values are all in the values file.
        num_values: Complete fp32 values in the values file.
        num_damaged: Complete records that fail their checksum, except at the end.
        torn_bytes: Bytes at the end of the index, left by a killed or interrupted writer, without a valid record.
    """

    index: Path
    fits: bool
    records_E: np.ndarray
    num_values: int
    num_damaged: int = 0
    torn_bytes: int = 0

    @property
    def values(self) -> Path:
        return self.index.with_suffix(".values")

    def map_values(self) -> np.ndarray:
        """The values, memory-mapped; complete ones only, since a killed writer may leave part of one."""
        if not self.num_values:
            return np.zeros(0, dtype="<f4")  # an empty file cannot be mapped
        return np.memmap(self.values, dtype="<f4", mode="r", shape=(self.num_values,))


def fingerprint_digest(fingerprint: dict[str, str]) -> bytes:
    """32-byte digest of the fingerprint; stored in every shard, so that shards of different stores cannot be mixed."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest()


def read_fingerprint(directory: Path) -> dict[str, str]:
    """The fingerprint of the store in `directory`.

    Raises:
        ReferenceStoreError: there is no store, or it has another format.
    """
    path = directory / "fingerprint.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReferenceStoreError(f"{directory}: not a reference store (no fingerprint.json)") from error
    except json.JSONDecodeError as error:
        raise ReferenceStoreError(f"{path}: not valid JSON ({error}); remove the store") from error
    if not isinstance(stored, dict):
        raise ReferenceStoreError(f"{path}: contains a {type(stored).__name__}, not an object; remove the store")
    found = stored.get("format", 1)
    if found != FORMAT:
        raise ReferenceStoreError(
            f"{directory}: a reference store of format {found}; this version of bpo reads and writes format {FORMAT}. "
            "Remove it, or set train.reference_dir to another directory: its log-probs are computed again, once"
        )
    if not isinstance(stored.get("fingerprint"), dict):
        raise ReferenceStoreError(f"{path}: has no `fingerprint`, so the store cannot be validated; remove the store")
    return stored["fingerprint"]


def write_fingerprint(directory: Path, fingerprint: dict[str, str]) -> None:
    path = directory / "fingerprint.json"
    replace_file(path, json.dumps({"format": FORMAT, "fingerprint": fingerprint}, indent=1, sort_keys=True).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path` atomically and durably.

    Raises:
        ReferenceStoreError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)
    except OSError as error:
        raise _cannot_write(path, len(content), error) from error


def write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def index_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.index"))


def read_shard(index: Path, fingerprint: dict[str, str]) -> Shard:
    """Reads the valid records of a shard; torn ends and damaged records are counted and skipped."""
    content = index.read_bytes()
    values = index.with_suffix(".values")
    num_values = values.stat().st_size // 4 if values.exists() else 0
    nothing = np.zeros(0, dtype=RECORD)
    if len(content) < HEADER_BYTES and header(fingerprint).startswith(content):
        return Shard(index, True, nothing, num_values, torn_bytes=len(content))
    if content[:HEADER_BYTES] != header(fingerprint):
        return Shard(index, False, nothing, num_values)
    whole = (len(content) - HEADER_BYTES) // RECORD.itemsize
    records_E = np.frombuffer(content, dtype=RECORD, count=whole, offset=HEADER_BYTES)
    intact_E = _checksums(content, whole) == records_E["own_crc"]
    intact_E &= records_E["offset"] + records_E["count"] <= num_values
    # Invalid records at the end were never finished; invalid records before a valid one were damaged later.
    finished = int(np.flatnonzero(intact_E)[-1]) + 1 if intact_E.any() else 0
    torn_bytes = len(content) - HEADER_BYTES - finished * RECORD.itemsize
    num_damaged = finished - int(intact_E.sum())
    return Shard(index, True, records_E[intact_E], num_values, num_damaged, torn_bytes)


def header(fingerprint: dict[str, str]) -> bytes:
    return MAGIC + fingerprint_digest(fingerprint)


def _checksums(content: bytes, count: int) -> np.ndarray:
    view, size = memoryview(content), RECORD.itemsize
    starts = range(HEADER_BYTES, HEADER_BYTES + count * size, size)
    return np.fromiter((zlib.crc32(view[s : s + _SIGNED_BYTES]) for s in starts), dtype=np.uint32, count=count)


def new_record(key: bytes, offset: int, raw: bytes) -> bytes:
    """The record of an entry with value bytes `raw` at value `offset` of the shard."""
    record = np.zeros((), dtype=RECORD)
    record["key"] = np.frombuffer(key, dtype=np.uint8)
    record["offset"], record["count"], record["crc"] = offset, len(raw) // 4, zlib.crc32(raw)
    signed = record.tobytes()[:_SIGNED_BYTES]
    return signed + zlib.crc32(signed).to_bytes(4, "little")


class ShardWriter:
    """Appends entries to a new shard; they are durable after `commit`, which `add` calls every 30 s.

    No file is created before the first commit. After an error the writer is closed; committed entries remain valid.

    Args:
        option: The option that sets `directory`, for messages.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, str], label: str, option: str = "train.reference_dir"):
        self._option = option
        host = os.uname().nodename.split(".")[0]
        self.index = directory / f"{label}-{host}-{os.getpid()}-{os.urandom(3).hex()}.index"
        self._header = header(fingerprint)
        self._descriptors: tuple[int, int] | None = None
        self._num_values = 0
        self._values: list[bytes] = []
        self._records: list[bytes] = []
        self._pending_bytes = 0
        self._last_commit = time.monotonic()

    def add(self, key: bytes, values_E: np.ndarray) -> None:
        """Adds one entry; `values_E` is converted to fp32."""
        raw = values_E.astype("<f4", copy=False).tobytes()
        self._records.append(new_record(key, self._num_values, raw))
        self._values.append(raw)
        self._num_values += len(raw) // 4
        self._pending_bytes += len(raw)
        if self._pending_bytes >= COMMIT_BYTES or time.monotonic() - self._last_commit >= COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Makes all added entries durable: values first, then the records that reference them.

        Raises:
            ReferenceStoreError: the disk is full or cannot be written, or another process removed the shard.
        """
        if not self._records:
            return
        try:
            if self._descriptors is None:
                self._create()
            assert self._descriptors is not None
            values, index = self._descriptors
            if os.fstat(index).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "the shard was removed while it was being written")
            for descriptor, chunks in ((values, self._values), (index, self._records)):
                write_all(descriptor, b"".join(chunks))
                sync_file(descriptor)
        except OSError as error:
            self._release()
            needed = self._pending_bytes + len(self._records) * RECORD.itemsize
            raise _cannot_write(self.index, needed, error, self._option) from error
        self._values, self._records, self._pending_bytes = [], [], 0
        self._last_commit = time.monotonic()

    def _create(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        values = os.open(self.index.with_suffix(".values"), flags, 0o666)
        try:
            index = os.open(self.index, flags, 0o666)
        except OSError:
            os.close(values)
            raise
        self._descriptors = (values, index)
        with contextlib.suppress(OSError):  # no locks on this file system: `is_free` goes by age
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_all(index, self._header)
        sync_directory(self.index.parent)

    def close(self) -> None:
        self.commit()
        self._release()

    def _release(self) -> None:
        for descriptor in self._descriptors or ():
            os.close(descriptor)
        self._descriptors = None


def _cannot_write(
    path: Path, needed_bytes: int, error: OSError, option: str = "train.reference_dir"
) -> ReferenceStoreError:
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if error.errno not in full:
        return ReferenceStoreError(
            f"{path}: cannot be written ({error.strerror}); make the directory writable, or copy the store to a "
            f"writable one and set {option} to it"
        )
    free = shutil.disk_usage(path.parent).free
    return ReferenceStoreError(
        f"{path}: {error.strerror}: the next entries need {needed_bytes:,} bytes, {free:,} are free there (a quota or "
        "file size limit may be lower). Stored entries remain valid: free space and restart; only missing entries are "
        "computed"
    )


def settled(shard: Shard, older_than_minutes: float) -> bool:
    """Whether the last write to the shard is at least this old; a younger shard may still have a writer."""
    newest = max(file.stat().st_mtime for file in (shard.index, shard.values) if file.exists())
    return time.time() - newest >= 60 * older_than_minutes


def is_free(shard: Shard, older_than_minutes: float) -> bool:
    """Whether no process writes to the shard: by the lock of its writer, or by age where the file system has no locks.

    Where locks hold on one machine only, a writer elsewhere is not seen; its next commit then ends it with an error.
    """
    descriptor = os.open(shard.index, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return settled(shard, older_than_minutes)
    finally:
        os.close(descriptor)
    return True


def damaged_rows(shard: Shard) -> np.ndarray:
    """Rows of `shard.records_E` whose values fail their checksum; reads every value once."""
    values = shard.map_values()
    columns = zip(*(shard.records_E[name].tolist() for name in ("offset", "count", "crc")), strict=True)
    bad = [row for row, (o, n, crc) in enumerate(columns) if zlib.crc32(values[o : o + n].data) != crc]
    return np.array(bad, dtype=np.int64)


def write_index(path: Path, fingerprint: dict[str, str], records_E: np.ndarray) -> None:
    """Writes an index file with these records, atomically."""
    replace_file(path, header(fingerprint) + records_E.tobytes())
