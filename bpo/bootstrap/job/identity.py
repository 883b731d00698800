"""Everything that the results of a bootstrapping job depend on: outcomes of different identities are not mixed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from bpo.bootstrap.inject import Mode, prompt_text
from bpo.config.training import Config
from bpo.formats.importers.registry import open_source
from bpo.job.durable import write_durably
from bpo.model.reference.fingerprint import loaded_files

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096
# Options that affect speed or location, not results: they may change between starts (prompt_dir: its content counts).
_DECIDED_AT_MERGE = ("refuse_duplicates",)
_NOT_DECIDING = ("prompt_dir", "server")


def job_identity(config: Config) -> dict[str, Any]:
    """Dotted option -> value for everything that affects an outcome; batch size, limits and ranks do not."""
    options = config.bootstrap
    identity: dict[str, Any] = {
        "data.annotations (content)": _content_digest(Path(config.data.annotations)),
        "data.max_completion_words": config.data.max_completion_words,
        "data.max_length_tokens": config.data.max_length_tokens,
        "data.min_pixels": config.data.min_pixels or None,  # None: as in jobs of versions without the option
        "data.max_pixels": config.data.max_pixels or None,
        "model.path": config.model.path,
        "model.path (weights)": weights_digest(config.model.path),
        "model.dtype": config.model.dtype,
        "bootstrap.seed": options.seed,
        "bootstrap.sources": sorted(options.generated_sources),
    }
    validate = {name: value for name, value in asdict(options.validate).items() if name not in _DECIDED_AT_MERGE}
    identity |= {f"bootstrap.validate.{name}": value for name, value in validate.items()}
    lexicon = options.validate.lexicon
    identity["bootstrap.validate.lexicon (content)"] = _digest(Path(lexicon).read_bytes()) if lexicon else None
    if set(options.generated_sources) - {"inject"}:
        identity |= {f"bootstrap.weaken.{name}": value for name, value in asdict(options.weaken).items()}
        identity["bootstrap.vision.engine"] = options.vision.engine
        identity["bootstrap.vision.server.model"] = options.vision.server.model
    if "regenerate" in options.sources:
        identity |= {f"bootstrap.regenerate.{name}": value for name, value in asdict(options.regenerate).items()}
    if "inject" in options.sources:
        inject = {name: value for name, value in asdict(options.inject).items() if name not in _NOT_DECIDING}
        identity |= {f"bootstrap.inject.{name}": value for name, value in inject.items()}
        identity["bootstrap.inject.server.model"] = options.inject.server.model
        identity["bootstrap.inject.llm (weights)"] = weights_digest(options.inject.llm)
        identity["bootstrap.inject.prompt_dir (content)"] = _prompts_digest(
            options.inject.mode, options.inject.prompt_dir
        )
    return identity


def check_identity(config: Config, folder: Path) -> None:
    """Writes the identity to `folder/job.json`, or compares it with the stored one.

    Raises:
        ValueError: They differ; lists each option with its old and new value.
    """
    identity = json.loads(json.dumps(job_identity(config)))
    path = folder / "job.json"
    if not path.exists():
        # Racing ranks write the same bytes.
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(identity, indent=2) + "\n")
        return
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), so nothing tells whether its results are of these options; restore it, or "
            f"remove {folder} to start over"
        ) from error
    differing = [name for name in {**stored, **identity} if stored.get(name) != identity.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {stored.get(name)!r}, is {identity.get(name)!r}" for name in differing)
        raise ValueError(
            f"{folder} contains the results of a job with other options: {changes}. "
            f"Restore them, set data.groups to another file, or remove {folder} to start over"
        )


def weights_digest(path: str) -> str | None:
    """SHA-256 over samples of every weight file and all of every other file that transformers loads; None for a hub id.

    64 samples of 4 KiB per file distinguish trained from untrained weights without reading tens of gigabytes.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        return None
    digest, loaded = hashlib.sha256(), set(loaded_files(folder))
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHT_SUFFIXES:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            _add_samples(digest, file)
        elif file in loaded and file.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _add_samples(digest: Any, file: Path) -> None:
    size_bytes = file.stat().st_size
    stride_bytes = max(_SAMPLE_BYTES, size_bytes // _SAMPLES_PER_FILE)
    with file.open("rb") as stream:
        for offset in range(0, size_bytes, stride_bytes):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLE_BYTES))


def _prompts_digest(configured: Literal["description", "qa", "auto"], prompt_dir: str) -> str:
    modes: tuple[Mode, ...] = ("description", "qa") if configured == "auto" else (configured,)
    return _digest("".join(prompt_text(mode, prompt_dir) for mode in modes).encode("utf-8"))


def _content_digest(annotations: Path) -> str:
    """SHA-256 of the bytes of all annotation files, such as a folder of shards, in order.

    For a dataset on the hub, of its name.
    """
    digest = hashlib.sha256()
    for part in open_source(annotations).container.paths:
        files = [part] if part.is_file() else sorted(path for path in part.rglob("*") if path.is_file())
        if not files:
            digest.update(str(part).encode("utf-8"))
        for path in files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
