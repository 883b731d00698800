"""Reference stores for tests: four entries with recognisable keys."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from bpo.model.reference.store import ReferenceStore

FINGERPRINT = {"file:model.safetensors": "abc", "dtype": "float32"}
VALUES = {"one": [-0.5, -1.25, -3.0], "two": [-7.0], "three": [-0.125, -0.25], "four": [-2.0, -4.0, -8.0, -16.0]}


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def put(store: ReferenceStore, *names: str) -> None:
    for name in names:
        store.put(key_of(name), torch.tensor(VALUES[name]))


def filled(directory: Path, *names: str, rank: int = 0) -> ReferenceStore:
    """A store with one more shard of these entries (default: the first three)."""
    store = ReferenceStore(directory, FINGERPRINT, rank)
    put(store, *(names or ("one", "two", "three")))
    store.close()
    store.reload()
    return store


def shard(directory: Path, suffix: str) -> Path:
    """The one file with this suffix."""
    (path,) = directory.glob(f"*.{suffix}")
    return path


def flip_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
