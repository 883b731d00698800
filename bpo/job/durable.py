"""Durable writes: a file is replaced as a whole or left as it was, whatever kills the process or fills the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Of file systems that cannot sync: some in user space, some of containers. They give no guarantee to wait for.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def sync_file(descriptor: int) -> None:
    """fsync where the file system has it.

    Raises:
        OSError: the content could not be written.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_directory(directory: Path) -> None:
    """Makes new names in a directory durable; also the content of a file."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file in the folder of `path`; renames it to `path` on success, removes it on error.

    Args:
        sync: Returns when content and name are on disk. False survives a killed process but not a power failure.
    """
    # Not named by the process id: processes of two machines may share it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            if sync:
                file.flush()
                sync_file(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def write_durably(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Replaces a small file as a whole; see `replacing`."""
    with replacing(path, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary folder next to `path`; renames it to `path` when all its files are on disk.

    Raises:
        OSError: `path` exists and is not an empty folder (the temporary folder is then removed, as after any error).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_directory(file)
        sync_directory(temporary)
        os.rename(temporary, path)  # replaces an empty folder, and nothing else
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
