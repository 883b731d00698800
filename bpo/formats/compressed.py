"""Streams compressed files (gzip, bzip2, xz, zstd) in bounded memory, and refuses those that expand without end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from bpo.formats.problems import RecordError

# Text compresses by a factor of 3 to 30. A file that expands beyond both limits is refused.
FREE_BYTES = 128 << 20
MAX_RATIO = 200
MAGIC_BYTES = 10


class StreamError(RecordError):
    """A compressed file that is damaged or expands too far; what was read before remains valid."""


def _zstd(file: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("zstd requires pyarrow; pip install 'bpo[hub]', or unpack it with `zstd -d`") from error
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _zstd,
}


def compression_of(head: bytes) -> str | None:
    """Returns the compression of a file that starts with `head` (`MAGIC_BYTES` long), or None."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    return "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else None


def decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    """Returns the content of an open file: the file itself, or a stream of its decompressed content.

    Seeking backwards by more than the buffer decompresses the file from its start.

    Raises:
        ValueError: The package that decompresses it is missing.
    """
    kind = compression_of(file.read(MAGIC_BYTES))
    file.seek(0)
    if kind is None:
        return file
    file.close()
    try:
        return io.BufferedReader(_Decompressed(path, kind), 1 << 16)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Decompressed(io.RawIOBase):
    def __init__(self, path: Path, kind: str):
        self._path, self._kind = path, kind
        self._size_bytes = path.stat().st_size
        self._restart()

    def _restart(self) -> None:
        self._file = self._path.open("rb")
        self._stream, self._position = _OPENERS[self._kind](self._file), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read1(len(buffer))  # `read` would lose what precedes the damage
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise StreamError(
                "torn-record",
                f"{self._path}: the {self._kind} data are damaged or cut off ({error}); download it again",
            ) from error
        buffer[: len(block)] = block
        self._position += len(block)
        if self._position > max(FREE_BYTES, MAX_RATIO * self._size_bytes):
            raise StreamError(
                "too-large",
                f"{self._path}: its {self._size_bytes} bytes of {self._kind} expand to more than {MAX_RATIO} times as "
                "much; if this is intended, unpack it",
            )
        return len(block)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the size of a compressed stream is not known")
        if target < self._position:
            self._stream.close()
            self._file.close()
            self._restart()
        while self._position < target:
            if not self.readinto(memoryview(bytearray(min(1 << 16, target - self._position)))):
                break
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()
