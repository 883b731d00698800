"""Fingerprints of weights, from samples of their files: quick, to tell policies and finished work apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bpo.config.adapter import base_of, is_adapter
from bpo.model.reference.fingerprint import adapter_files, loaded_files

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


def policy_fingerprint(path: str) -> str:
    """16 hexadecimal digits of the weights of a model or adapter directory; `hub:NAME` of a Hub id.

    That of an adapter covers its base.
    """
    digest = weights_digest(path)
    return f"hub:{path}" if digest is None else digest[:16]


def weights_digest(path: str) -> str | None:
    """SHA-256 over samples of every weight file and all of every other file that transformers loads; None for a hub id.

    64 samples of 4 KiB per file distinguish trained from untrained weights without reading tens of gigabytes. The
    digest of an adapter covers that of its base.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        return None
    if is_adapter(path):
        base = base_of(path)
        parts = f"{weights_digest(base) or f'hub:{base}'} {_digest_of(adapter_files(folder))}"
        return hashlib.sha256(parts.encode()).hexdigest()
    loaded = set(loaded_files(folder))
    return _digest_of(file for file in sorted(folder.iterdir()) if file in loaded or file.suffix in _WEIGHT_SUFFIXES)


def _digest_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in _WEIGHT_SUFFIXES:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            _add_samples(digest, file)
        elif file.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _add_samples(digest: Any, file: Path) -> None:
    size_bytes = file.stat().st_size
    stride_bytes = max(_SAMPLE_BYTES, size_bytes // _SAMPLES_PER_FILE)
    with file.open("rb") as stream:
        for offset in range(0, size_bytes, stride_bytes):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLE_BYTES))
