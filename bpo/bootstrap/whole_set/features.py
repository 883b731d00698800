"""Features of the records' images from the vision tower of `model.path`: computed once, kept in the job's folder.

    GROUPS.parts/features-IDENTITY.jsonl   one line per record: a digest of its images and float16 features

Shape letters: N records, D features, B images (or tiles).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bpo.bootstrap.whole_set.takers import Annotations
from bpo.config.training import Config
from bpo.data.encode import EncodedImages, Encoder, load_encoder
from bpo.formats.images import ImageError
from bpo.job.journal import JournalReader, JournalWriter, to_line
from bpo.job.launch import Ranks, pick_device
from bpo.model.load import load_model
from bpo.model.weights import weights_digest
from bpo.records import Annotation

logger = logging.getLogger(__name__)

_NO_FEATURES = -1
_NOT_DECIDING = ("annotations", "groups", "max_completion_words", "num_workers", "prefetch_factor", "keep_lengths")


class ImageFeatures:
    """Mean-pooled features of each record's images, centred and of length 1.

    Args:
        annotations: All annotations of the job.
        positions: [N] positions of the records to read or compute the features of.

    Attributes:
        has: [N] bool, whether the record has images that can be read.
    """

    def __init__(self, config: Config, annotations: Annotations, positions: np.ndarray):
        self._path = Path(f"{config.data.groups}.parts") / f"features-{_identity(config)}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[bytes, int] = {}
        self._file = tempfile.TemporaryFile(prefix="bpo-features-")  # noqa: SIM115 open as long as this object
        self._size = 0
        reader = JournalReader(self._path)
        with JournalWriter(self._path, exclusive=True) as writer:
            self._read(reader)
            missing = (a for p in positions if (a := annotations[int(p)]).images and _digest(a) not in self._rows)
            _compute(config, missing, writer)
            self._read(reader)
        rows = [self._rows.get(_digest(annotations[int(position)]), _NO_FEATURES) for position in positions]
        self._row = np.array(rows, dtype=np.int64)
        self.has = self._row != _NO_FEATURES
        self._values_ND: np.ndarray = np.empty((0, 0), np.float16)
        if self._size:
            self._file.flush()
            self._values_ND = np.memmap(self._file, dtype=np.float16, mode="r").reshape(-1, self._size)
        self._centre_D = self._values_ND.mean(axis=0, dtype=np.float32) if len(self._values_ND) else np.zeros(0)
        if not self.has.all():
            logger.warning("%d records have no image that can be read; they get no negative", int((~self.has).sum()))

    def similarity(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """[R, C] float32: cosine of the features of two records."""
        product: np.ndarray = self._of(rows) @ self._of(columns).T
        return product

    def hashes(self, seed: int, num_bits: int) -> np.ndarray:
        """[N] uint64: on which side of random planes the features are; near images are on the same side of most."""
        planes_DK = np.random.default_rng(seed).standard_normal((self._size, num_bits)).astype(np.float32)
        codes = np.zeros(len(self._row), dtype=np.uint64)
        for first in range(0, len(self._row), 4096):
            numbers = np.arange(first, min(first + 4096, len(self._row)))
            bits = (self._of(numbers) @ planes_DK > 0).astype(np.uint64)
            codes[numbers] = (bits << np.arange(num_bits, dtype=np.uint64)[::-1]).sum(axis=1, dtype=np.uint64)
        return codes

    def _of(self, numbers: np.ndarray) -> np.ndarray:
        found_ND = np.zeros((len(numbers), self._size), dtype=np.float32)
        has = self.has[numbers]
        found_ND[has] = self._values_ND[self._row[numbers[has]]] - self._centre_D
        return found_ND / np.maximum(np.linalg.norm(found_ND, axis=1, keepdims=True), 1e-6)

    def _read(self, reader: JournalReader) -> None:
        for _, (digest, values) in reader.poll(_entry):
            if digest in self._rows:
                continue
            self._rows[digest] = _NO_FEATURES
            if values:
                self._size = self._size or len(values) // 2
                self._rows[digest] = self._file.tell() // len(values)
                self._file.write(values)


def _compute(config: Config, annotations: Iterator[Annotation], writer: JournalWriter) -> None:
    """Appends the features of records, batch by batch; those of images that cannot be read are empty."""
    first = next(annotations, None)
    if first is None:
        return
    encoder = load_encoder(config)
    model = load_model(config.model, pick_device(Ranks()))
    tower = _Tower(model, encoder)
    done: set[bytes] = set()
    stream = chain([first], annotations)
    while batch := list(islice(stream, config.bootstrap.batch_size)):
        fresh = {digest: a for a in batch if (digest := _digest(a)) not in done}
        done.update(fresh)
        encoded: dict[bytes, EncodedImages] = {}
        lines = []
        for digest, annotation in fresh.items():
            try:
                encoded[digest] = encoder.encode_images(annotation.images)
            except ImageError as error:
                logger.warning("record %r: %s", annotation.id, error)
                lines.append(to_line([digest.hex(), ""]))
        for digest, values_D in zip(encoded, tower.features(list(encoded.values())), strict=True):
            lines.append(to_line([digest.hex(), base64.b64encode(values_D.astype("<f2").tobytes()).decode("ascii")]))
        writer.append(b"".join(lines))


class _Tower:
    """Runs the vision tower on the images of several records."""

    def __init__(self, model: Any, encoder: Encoder):
        self._model, self._encoder = model, encoder
        self._seen: list[torch.Tensor] = []
        model.get_submodule(encoder.family.vision_module).register_forward_hook(self._see)

    def _see(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._seen.append(getattr(output, "last_hidden_state", output))

    @torch.inference_mode()
    def features(self, images: Sequence[EncodedImages]) -> Iterator[np.ndarray]:
        """For each record, the mean over its images and their tokens [D]."""
        # One entry of `pixel_values` per image: several records in one call.
        if all(each.inputs["pixel_values"].dim() == 4 for each in images) and self._encoder.family.repeats_features:
            sizes = [len(each.inputs["pixel_values"]) for each in images]
            hidden_BTD = self._run([each.inputs for each in images]) if images else torch.zeros(0, 1, 1)
            means_BD = hidden_BTD.flatten(1, -2).float().mean(dim=1)
            yield from (mean_BD.mean(dim=0).cpu().numpy() for mean_BD in means_BD.split(sizes))
            return
        for each in images:
            hidden = self._run([each.inputs])
            yield hidden.float().flatten(0, -2).mean(dim=0).cpu().numpy()

    def _run(self, inputs: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        self._seen.clear()
        device, dtype = self._model.device, self._model.dtype
        batch = self._encoder.family.batch_image_inputs(inputs)
        moved = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in batch.items()}
        self._model.model.get_image_features(**moved)
        return self._seen[0]


def _entry(value: Any) -> tuple[bytes, bytes]:
    digest, values = value
    return bytes.fromhex(digest), base64.b64decode(values)


def _digest(annotation: Annotation) -> bytes:
    names = "\0".join(annotation.images)
    return hashlib.blake2b(names.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _identity(config: Config) -> str:
    """A digest of everything that the features depend on, except the images' content."""
    data = {name: value for name, value in asdict(config.data).items() if name not in _NOT_DECIDING}
    decides = [config.model.path, weights_digest(config.model.path), config.model.dtype, sorted(data.items())]
    return hashlib.sha256(repr(decides).encode("utf-8", "surrogatepass")).hexdigest()[:16]
