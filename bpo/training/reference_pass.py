"""Computes the reference log-probs missing from the store, before the first step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bpo.config.training import Config
from bpo.data.groups import MeasuredGroup
from bpo.data.reference_keys import split_keys
from bpo.data.schedule import split_into_micro_batches
from bpo.data.transfer import on_device
from bpo.engine import TrainingEngine
from bpo.job.collectives import barrier, from_rank_0, gather_from_ranks
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from bpo.losses.program import HeadOutput
from bpo.model.load import ResolvedModel
from bpo.model.reference.cells import put_reference
from bpo.model.reference.format import ReferenceStoreError
from bpo.model.reference.store import (
    ReferenceStore,
    open_or_create,
    other_reference,
    run_fingerprint,
    store_directory,
)
from bpo.records import GroupBatch, LostGroup
from bpo.training.batches import micro_batches, row_lengths
from bpo.training.measure import TrainingData

logger = logging.getLogger(__name__)


def fill_reference_store(
    config: Config, model: ResolvedModel, engine: TrainingEngine, data: TrainingData, stop: StopRequest | None = None
) -> ReferenceStore:
    """Computes the missing entries with the training engine, before its first step; each rank computes its share.

    Must run before a checkpoint is loaded: only the untrained policy is the reference. With another reference
    (`train.reference_model`), nothing is computed: a run with `train.reference_only` on that model fills its store.

    Raises:
        ReferenceStoreError: the store does not match the run; see also `complete_store`.
        Interrupted: on all ranks, if any of them was asked to stop; computed entries are stored.
    """
    directory = store_directory(config)
    fingerprint = from_rank_0(lambda: _open_store(config, model, directory))
    store = ReferenceStore(directory, fingerprint, engine.ranks.rank)
    complete_store(store, config, engine, data, stop)
    store.close()
    return store


def complete_store(
    store: ReferenceStore,
    config: Config,
    engine: TrainingEngine,
    data: TrainingData,
    stop: StopRequest | None,
    weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    quiet: bool = False,
) -> int:
    """Computes the entries that the store lacks; each rank computes its share. The store stays open for more.

    Args:
        weights: Context in which the model has the weights of the reference.
        quiet: Log only for debugging, for a pass that is repeated between steps.

    Returns:
        Number of tokens computed, over all ranks.

    Raises:
        ReferenceStoreError: it cannot be written, or lacks entries after the pass, or of another reference.
        Interrupted: on all ranks, if any of them was asked to stop; computed entries are stored.
    """
    directory, log = store.directory, logger.debug if quiet else logger.info
    # Decided by one rank: another job may be adding to the store, and all ranks must agree on the missing groups.
    missing = from_rank_0(lambda: _missing_groups(store, data))
    barrier()  # a slower rank must not read entries that others already write
    if missing and (other := other_reference(config)):
        raise ReferenceStoreError(
            f"the reference store {directory} lacks {len(missing)} of {len(data.measured)} groups of "
            f"train.reference_model {other}; compute them first: the same command with --model.path {other} "
            f"--train.reference_only true --train.reference_dir {directory}"
        )
    if not missing:
        log("reference store %s: complete, %d entries", directory, len(store))
        return 0
    with weights():
        name, lost, stopped = score_groups(config, engine, data, store, missing, stop, quiet=quiet)
    store.reload(gather_from_ranks(name))
    data.lost.report(gather_from_ranks([asdict(group) for group in lost]), is_main=engine.ranks.is_main)
    lacking = len(_missing_groups(store, data))
    if lacking and stopped:
        raise Interrupted(f"stopped by a signal in the reference pass; {lacking} of {len(missing)} groups remain")
    if lacking:
        raise ReferenceStoreError(
            f"{directory}: entries of {lacking} groups are missing after the pass; do all nodes share it?"
        )
    log("reference store %s: %d entries, %d groups computed now", directory, len(store), len(missing))
    return sum(data.num_tokens[g] for g in missing)


def model_description(config: Config, model: ResolvedModel) -> dict[str, str]:
    """The fingerprint of `model.path`, for a run with a store of another model or with none. Call on all ranks."""
    directory = Path(config.train.output_dir)
    return from_rank_0(lambda: run_fingerprint(config, model, directory))


def _open_store(config: Config, model: ResolvedModel, directory: Path) -> dict[str, str]:
    fingerprint = run_fingerprint(config, model, directory, other_reference(config))
    open_or_create(directory, fingerprint)
    return fingerprint


def groups_without_entries(
    store: ReferenceStore, data: TrainingData, keys_of: Callable[[MeasuredGroup], Iterable[str]]
) -> list[int]:
    """Planned groups with a key that the store lacks, without lost ones; a shared key counts for its first group."""
    present = [(g, group) for g, group in enumerate(data.measured) if data.usable[g] not in data.lost.indices]
    first_with_key = {key: g for g, group in reversed(present) for key in keys_of(group)}
    stored = store.has(list(first_with_key)).tolist()
    return sorted({g for g, has in zip(first_with_key.values(), stored, strict=True) if not has})


def _missing_groups(store: ReferenceStore, data: TrainingData) -> list[int]:
    return groups_without_entries(store, data, lambda group: split_keys(group.cell_keys))


def score_groups(
    config: Config,
    engine: TrainingEngine,
    data: TrainingData,
    store: ReferenceStore,
    missing: list[int],
    stop: StopRequest | None,
    *,
    quiet: bool,
) -> tuple[str | None, list[LostGroup], bool]:
    """Computes this rank's share into its own shard.

    Returns:
        The shard's name, the groups whose images are no longer what was measured, and whether `stop` cut it short.

    Without a backward pass activations are freed after each layer, so a micro-batch may be larger than in training.
    """
    tokens = data.num_tokens
    limit = config.train.reference_micro_batch_tokens or 4 * config.train.max_micro_batch_tokens
    # Over the whole pass differences between bins even out, and balancing that many bins would be slow.
    plan = split_into_micro_batches(
        missing, tokens, engine.ranks.world_size, limit, level=False, row_tokens=data.row_tokens
    )
    mine = [(groups or missing[:1], not groups) for groups in plan[engine.ranks.rank]]
    total = sum(tokens[g] for g in missing)
    log = logger.debug if quiet else logger.info
    log("reference pass: %d groups, %s tokens, %d batches per rank", len(missing), f"{total:,}", len(mine))
    started = time.perf_counter()
    share = sum(tokens[g] for groups, _ in mine for g in groups)
    hidden = quiet or not engine.ranks.is_main
    lost: list[LostGroup] = []
    done_tokens, stopped = 0, False
    # An online run has many passes, whose rows are not known in advance.
    rows = None if config.online.source else (data.tokens_of_row(row) for of_rank in plan for row in of_rank if row)
    lengths = row_lengths(engine, rows, limit)
    batches = micro_batches(config.data, data, mine, engine, for_reference=True, lengths=lengths)
    with tqdm(total=share, unit="tok", unit_scale=True, desc="reference log-probs", disable=hidden) as progress:
        for batch in on_device(batches, engine.device, engine.dtype):
            _store_batch(store, batch, engine.reference_logp(batch))
            lost += batch.lost
            progress.update(batch.input_ids_T.numel())
            done_tokens += batch.input_ids_T.numel()
            # All ranks have the same number of micro-batches, so they can agree to stop after each, as after each step.
            if stop is not None and engine.sum_over_ranks([float(stop.received)])[0]:
                stopped = True
                break
    name = store.commit()
    seconds = time.perf_counter() - started
    log("reference pass: %.1f s, %s tokens per second per rank", seconds, f"{done_tokens / seconds:,.0f}")
    return name, lost, stopped


def _store_batch(store: ReferenceStore, batch: GroupBatch, head: HeadOutput) -> None:
    if batch.is_filler:
        return  # the rank that owns the group computes it
    # Copied once per batch: each copy waits for the device.
    put_reference(store, batch, head.logp_N.cpu(), None if head.second_M is None else head.second_M.cpu())
