"""Embeddings of prompts for losses that compare prompts: computed once before the first step and stored.

    REFERENCE_DIR-embeddings/    a store like that of the reference, with one unit vector per group

The embedding joins the directions of the prompt's text and of its images (`bpo.model.prompt_embedding.joined`).
Shape letters: P pairs, U distinct keys, G groups, D size of an embedding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bpo.config.training import Config, DataConfig
from bpo.data.encode import Dropped
from bpo.data.schedule import split_into_micro_batches
from bpo.engine import TrainingEngine
from bpo.job.collectives import barrier, from_rank_0, gather_from_ranks
from bpo.job.exits import Interrupted
from bpo.job.process import prepare_for_workers
from bpo.job.signals import StopRequest, leave_signals_to_parent
from bpo.model.load import ResolvedModel
from bpo.model.prompt_embedding import OWN, SentenceEncoder, image_means, joined, num_entries, token_means
from bpo.model.reference.fingerprint import DIGESTS, DigestCache, loaded_files, model_fingerprint
from bpo.model.reference.format import ReferenceStoreError
from bpo.model.reference.store import ReferenceStore, open_or_create, store_directory
from bpo.records import LostGroup, Turn
from bpo.training.measure import TrainingData
from bpo.training.reference_pass import groups_without_entries

logger = logging.getLogger(__name__)

CODE_PATH = "prompt embeddings, v1"


class PromptEmbeddings:
    """Unit vectors of prompts by the key of their group, read from a store."""

    def __init__(self, store: ReferenceStore):
        self.store = store

    def similarity(self, keys: Sequence[str]) -> torch.Tensor:
        """Cosines [P, P] in fp64 on the CPU; exactly 1 for equal keys.

        Args:
            keys: `MeasuredGroup.reference_key` of the group of each pair.

        Raises:
            KeyError, ReferenceStoreError: see `ReferenceStore.gather`.
        """
        distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        if not distinct:
            return torch.zeros(0, 0, dtype=torch.float64)
        unit_UD = F.normalize(self.store.gather(list(distinct)).reshape(len(distinct), -1).double(), dim=1)
        cosine_UU = (unit_UD @ unit_UD.T).fill_diagonal_(1.0)
        number_P = torch.tensor([distinct[key] for key in keys])
        return cosine_UU[number_P][:, number_P]


def embeddings_directory(config: Config) -> Path:
    """The directory of a run's embeddings, beside its reference store."""
    reference = store_directory(config)
    return reference.with_name(f"{reference.name}-embeddings")


def fill_embedding_store(
    config: Config, model: ResolvedModel, engine: TrainingEngine, data: TrainingData, stop: StopRequest | None = None
) -> PromptEmbeddings:
    """Computes the missing embeddings; each rank computes its share. To be called on all ranks.

    Must run before a checkpoint is loaded: embeddings are those of the untrained model.

    Raises:
        ReferenceStoreError: the store is of another model or embedding, cannot be written, or lacks entries at the end.
        Interrupted: on all ranks, if any of them was asked to stop; computed entries are stored.
        ValueError: `loss.prompt_embedding` is not a sentence encoder; see `check_prompt_embedding`.
    """
    directory = embeddings_directory(config)
    fingerprint = from_rank_0(lambda: _open_store(config, model, directory))
    store = ReferenceStore(directory, fingerprint, engine.ranks.rank)
    # Decided by one rank, as for the reference: another job may be adding to the store.
    missing = from_rank_0(lambda: _missing_groups(store, data))
    barrier()  # a slower rank must not read entries that others already write
    if not missing:
        logger.info("prompt embeddings %s: complete, %d entries", directory, len(store))
        return PromptEmbeddings(store)
    name, lost, stopped = _embedding_pass(config, engine, data, store, missing, stop)
    store.reload(gather_from_ranks(name))
    data.lost.report(gather_from_ranks([asdict(group) for group in lost]), is_main=engine.ranks.is_main)
    lacking = len(_missing_groups(store, data))
    if lacking and stopped:
        raise Interrupted(f"stopped by a signal while embedding prompts; {lacking} of {len(missing)} groups remain")
    if lacking:
        raise ReferenceStoreError(f"{directory}: {lacking} entries are missing after the pass; do all nodes share it?")
    logger.info("prompt embeddings %s: %d entries, %d groups computed now", directory, len(store), len(missing))
    return PromptEmbeddings(store)


def _open_store(config: Config, model: ResolvedModel, directory: Path) -> dict[str, str]:
    fingerprint = _fingerprint(config, model)
    open_or_create(directory, fingerprint)
    return fingerprint


def _fingerprint(config: Config, model: ResolvedModel) -> dict[str, str]:
    """Everything that embeddings depend on, other than the records. Unlike log-probs, not the attention of the text."""
    kept = store_directory(config) / DIGESTS  # the reference's fingerprint has just hashed the same files
    rehash, kind = config.train.rehash_weights, config.loss.prompt_embedding
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "vision_attention": config.model.vision_attention,
        "pixels": f"{config.data.min_pixels} to {config.data.max_pixels}",
        "image_aspect": config.data.image_aspect,
        "prompt_embedding": "model" if kind == OWN else "sentence encoder",
    }
    found = model_fingerprint(config.model.path, kept_digests=kept, rehash=rehash, **settings)
    if kind != OWN:
        digests = DigestCache(kept, rehash).digests(loaded_files(Path(kind)))
        found |= {f"encoder:{file.name}": digest for file, digest in digests.items()}
    return found | {"code_path": CODE_PATH}


def _missing_groups(store: ReferenceStore, data: TrainingData) -> list[int]:
    return groups_without_entries(store, data, lambda group: [group.reference_key])


def _embedding_pass(
    config: Config,
    engine: TrainingEngine,
    data: TrainingData,
    store: ReferenceStore,
    missing: list[int],
    stop: StopRequest | None,
) -> tuple[str | None, list[LostGroup], bool]:
    """Computes this rank's share into its own shard.

    Returns:
        The shard's name, the groups whose images are no longer what was measured, and whether `stop` cut it short.
    """
    limit = config.train.reference_micro_batch_tokens or 4 * config.train.max_micro_batch_tokens
    # All ranks get the same number of batches, some perhaps empty: each runs the tower, as ZeRO's collectives require.
    tokens = [group.num_tokens for group in data.measured]
    mine = split_into_micro_batches(missing, tokens, engine.ranks.world_size, limit, level=False)[engine.ranks.rank]
    kind = config.loss.prompt_embedding
    encoder = None if kind == OWN else SentenceEncoder(kind, engine.device)
    logger.info("embedding prompts: %d groups, %d batches per rank, text by %s", len(missing), len(mine), kind)
    started, stopped = time.perf_counter(), False
    lost: list[LostGroup] = []
    engine.policy.eval()
    hidden = not engine.ranks.is_main
    with tqdm(total=sum(map(len, mine)), unit="group", desc="embedding prompts", disable=hidden) as progress:
        for batch in _load(config.data, data, mine):
            engine.on_forward()
            embedded_GD = _embed(engine, encoder, data, batch).cpu()
            for key, embedded_D in zip(batch.keys, embedded_GD, strict=True):
                store.put(key, embedded_D)
            lost += batch.lost
            progress.update(len(batch.keys))
            if stop is not None and engine.sum_over_ranks([float(stop.received)])[0]:
                stopped = True
                break
    engine.policy.train()
    name = store.close()
    logger.info("embedding prompts: %.1f s", time.perf_counter() - started)
    return name, lost, stopped


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of G groups with their images.

    keys: of each group, under which its embedding is stored.
    token_ids: of each prompt the tokens that are not of images.
    texts: of each prompt the texts of its turns, a line each.
    image_inputs: of the images of all prompts in order; of a stand-in, which no prompt has, if there are none.
    entries: `num_entries` of each prompt.
    lost: groups that are no longer what was measured.
    """

    keys: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    image_inputs: dict[str, torch.Tensor]
    entries: tuple[int, ...]
    lost: tuple[LostGroup, ...]


@torch.no_grad()
def _embed(
    engine: TrainingEngine, encoder: SentenceEncoder | None, data: TrainingData, batch: PromptBatch
) -> torch.Tensor:
    """Embeddings [G, D] of a batch; runs the same modules for a batch without groups."""
    model, family = engine.policy.model, data.dataset.encoder.family
    moved = {name: tensor.to(engine.device) for name, tensor in batch.image_inputs.items()}
    moved = {name: tensor.to(engine.dtype) if tensor.is_floating_point() else tensor for name, tensor in moved.items()}
    image_GD = image_means(model, family, moved, batch.entries or (0,))
    if encoder is None:
        text_GD = token_means(model, batch.token_ids or ((0,),))
    else:
        text_GD = encoder.embed(batch.texts or ("",))
    return joined(text_GD, image_GD)[: len(batch.keys)]


def prompt_text(prompt: Sequence[Turn]) -> str:
    """The texts of the turns that have one, a line each."""
    return "\n".join(turn.text for turn in prompt if turn.text)


class _PromptBatches(Dataset):
    """One item is one batch, so that worker processes prepare whole batches."""

    def __init__(self, data: TrainingData, batches: Sequence[Sequence[int]]):
        self.dataset = data.dataset
        self.batches = [[(data.usable[g], data.measured[g]) for g in groups] for groups in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> PromptBatch:
        encoder = self.dataset.encoder
        keys, token_ids, texts, images, lost = [], [], [], [], []
        for index, measured in self.batches[item]:
            group = self.dataset.load(index, measured)
            if isinstance(group, Dropped):
                lost.append(LostGroup(index, group.group_id, group.reason, group.detail))
                continue
            keys.append(measured.reference_key)
            token_ids.append(tuple(i for i in group.prompt.prefix_ids if i != encoder.image_token_id))
            texts.append(prompt_text(self.dataset.groups[index].prompt))
            images.append(group.prompt.image_inputs)
        entries = tuple(num_entries(inputs) for inputs in images)
        shown = [inputs for inputs in images if inputs] or [self.dataset.stand_in.image_inputs]
        inputs = encoder.family.batch_image_inputs(shown)
        return PromptBatch(tuple(keys), tuple(token_ids), tuple(texts), inputs, entries, tuple(lost))


def _load(config: DataConfig, data: TrainingData, batches: Sequence[Sequence[int]]) -> Iterator[PromptBatch]:
    """The batches in order, prepared ahead by `data.num_workers` processes."""
    prepare_for_workers(config.num_workers, config.prefetch_factor)
    loader: DataLoader[Any] = DataLoader(
        _PromptBatches(data, batches),
        batch_size=None,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
        collate_fn=_same,
        worker_init_fn=leave_signals_to_parent,
    )
    return iter(loader)


def _same(batch: Any) -> Any:
    return batch
