"""Features of the images of a step from a frozen vision tower: each image is encoded once, or read from a cache."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.data.useful_work import image_rows
from bpo.engine import TrainingEngine
from bpo.job.collectives import from_rank_0, gather_from_ranks
from bpo.model.levers import patch_embedding, vision
from bpo.model.load import ResolvedModel
from bpo.model.reference.fingerprint import DIGESTS, model_fingerprint
from bpo.model.reference.store import store_directory
from bpo.model.vision.cache import DiskCache, FeatureCache, MemoryCache
from bpo.records import GroupBatch

logger = logging.getLogger(__name__)

Entry = dict[str, torch.Tensor]


class StepFeatures:
    """Gives the micro-batches of a step the features of their images; set as `TrainingEngine.prepare_images`.

    All micro-batches of the step are loaded, with their pixels, before the first is used, and features are kept until
    their last use. Under ZeRO-3 it must be called on all ranks: they run the tower equally often.

    Args:
        batch_tokens: Maximum number of rows of the tower per call, unless one image has more.
        cache: Where features are kept for later steps, if anywhere.

    Attributes:
        num_encoded: Images and tiles that the tower has encoded so far.
    """

    def __init__(self, engine: TrainingEngine, family: Family, batch_tokens: int, cache: FeatureCache | None = None):
        self._engine, self._family, self._cache = engine, family, cache
        self._batch_tokens = batch_tokens
        self.num_encoded = 0

    def __call__(self, batches: Iterable[GroupBatch]) -> Iterator[GroupBatch]:
        waiting = deque(batches)
        features = self._features(waiting)
        uses = Counter(key for batch in waiting for key in batch.image_keys)
        while waiting:
            batch = waiting.popleft()
            own = tuple(features[key] for key in batch.image_keys)
            uses.subtract(batch.image_keys)
            for key in set(batch.image_keys):
                if not uses[key]:
                    del features[key]
            yield replace(batch, features=own)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _features(self, batches: Iterable[GroupBatch]) -> dict[str, torch.Tensor]:
        """Features of all images on the device, by key."""
        entries: dict[str, Entry] = {}
        for batch in batches:
            if batch.image_keys:
                entries |= zip(batch.image_keys, self._family.entries(batch.image_inputs), strict=True)
        features: dict[str, torch.Tensor] = {}
        for key in entries if self._cache is not None else ():
            if (kept := self._cache.get(key)) is not None:  # type: ignore[union-attr]
                features[key] = kept.to(self._engine.device)
        for keys in self._calls({key: entry for key, entry in entries.items() if key not in features}, entries):
            encoded = self._engine.encode_images([entries[key] for key in keys])
            features |= zip(keys, encoded, strict=True)
            self.num_encoded += len(keys)
            if self._cache is not None:
                for key, value in zip(keys, encoded, strict=True):
                    self._cache.put(key, value)
        return features

    def _calls(self, missing: dict[str, Entry], entries: dict[str, Entry]) -> list[list[str]]:
        """Keys of each call of the tower."""
        calls: list[list[str]] = []
        room = 0
        for key, entry in missing.items():
            size = image_rows(entry, self._family.config).patches
            if size > room or not calls:
                calls.append([])
                room = self._batch_tokens
            calls[-1].append(key)
            room -= size
        if self._engine.is_partitioned:
            # Each call gathers the tower's weights from all ranks; one with fewer images encodes one of them again.
            more = max(gather_from_ranks(len(calls))) - len(calls)
            calls += [[next(iter(entries))]] * more
        return calls


def use_step_features(
    config: Config,
    resolved: ResolvedModel,
    engine: TrainingEngine,
    family: Family,
    closing: contextlib.ExitStack,
) -> StepFeatures | None:
    """Makes the engine encode images as `vision.*` says; None if the tower runs in each micro-batch. Call on all ranks.

    Args:
        closing: Closes the cache at the end of the run.

    Raises:
        ValueError: `vision.*` cannot be used with this model, or the cache cannot be written.
    """
    options = config.vision
    if vision.choose(config, resolved).value != "step":
        return None
    features = StepFeatures(engine, family, options.batch_tokens, _cache(config, resolved, engine))
    engine.prepare_images = features
    closing.callback(features.close)
    return features


def _cache(config: Config, resolved: ResolvedModel, engine: TrainingEngine) -> FeatureCache | None:
    room_bytes = config.vision.cache_gb * 1e9
    if config.vision.cache == "memory":
        return MemoryCache(room_bytes)
    if config.vision.cache == "none":
        return None
    directory = Path(config.vision.cache_dir or Path(config.train.output_dir) / "features")
    fingerprint = from_rank_0(lambda: features_fingerprint(config, resolved))
    ranks = engine.ranks
    return DiskCache(directory, fingerprint, engine.dtype, room_bytes, ranks.rank, ranks.world_size)


def features_fingerprint(config: Config, resolved: ResolvedModel) -> dict[str, str]:
    """What features depend on, other than the image: weights, config, dtype, and the code that computes them."""
    import transformers

    facts = model_fingerprint(
        resolved.options.path,
        kept_digests=store_directory(config) / DIGESTS,
        rehash=config.train.rehash_weights,
        dtype=str(resolved.dtype).removeprefix("torch."),
        vision_attention=config.model.vision_attention,
        patch_embedding=patch_embedding.choose(config, resolved).value,
        device=resolved.device.type,
        transformers=transformers.__version__,
    )
    # Not the tokenizer's files and the like: keys cover the pixels.
    return {name: value for name, value in facts.items() if not name.startswith("file:") or _of_weights(name)}


def _of_weights(name: str) -> bool:
    return name == "file:config.json" or name.endswith((".safetensors", ".bin", ".index.json"))
