"""Micro-batches of a run with their reference log-probs, on the device."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bpo.config.training import DataConfig
from bpo.data.groups import iterate_micro_batches
from bpo.data.row_lengths import choose_lengths, pad_row, spaced_lengths
from bpo.data.schedule import PlannedStep
from bpo.data.transfer import on_device
from bpo.engine import TrainingEngine
from bpo.model.levers.compiled import num_row_lengths
from bpo.model.reference.cells import with_reference
from bpo.model.reference.store import ReferenceStore
from bpo.records import GroupBatch
from bpo.training.lost import LostGroups
from bpo.training.measure import TrainingData

logger = logging.getLogger(__name__)


def row_lengths(engine: TrainingEngine, num_tokens: Iterable[int] | None, max_tokens: int = 0) -> tuple[int, ...]:
    """The lengths to which packed rows are padded, the same on all ranks; none if no layers are compiled.

    Args:
        num_tokens: Tokens of every row of a pass, over all ranks; None if they are not known before the pass.
        max_tokens: Limit of rows that are not known.
    """
    number = num_row_lengths(engine.policy.model)
    if not number:
        return ()
    return spaced_lengths(max_tokens, number) if num_tokens is None else choose_lengths(num_tokens, number)


def micro_batches(
    config: DataConfig,
    data: TrainingData,
    batches: list[tuple[Any, bool]],
    engine: TrainingEngine,
    *,
    for_reference: bool = False,
    lengths: Sequence[int] = (),
) -> Iterator[GroupBatch]:
    """This rank's micro-batches, given as (planned groups, is_filler), in host memory; rows padded to `lengths`."""
    indices = [([data.usable[g] for g in groups], is_filler) for groups, is_filler in batches]
    packed = iterate_micro_batches(
        data.dataset,
        data.expected,
        indices,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor,
        pin_memory=engine.device.type == "cuda",
        for_reference=for_reference,
    )
    return (pad_row(batch, lengths, data.dataset.encoder.family) for batch in packed) if lengths else packed


@dataclass(frozen=True)
class StepBatches:
    """This rank's micro-batches of one step, loaded on demand; to be iterated once, in the order of steps.

    A list would delay the first until the last is loaded, and leave the worker processes idle during the step.

    Attributes:
        num_pairs: Preference pairs of the step over all ranks, without those of lost groups.
        lost: To which groups that the step loses are reported.
    """

    count: int
    source: Iterator[GroupBatch]
    num_pairs: int
    lost: LostGroups

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[GroupBatch]:
        return itertools.islice(self.source, self.count)


def training_batches(
    config: DataConfig,
    data: TrainingData,
    steps: list[PlannedStep],
    store: ReferenceStore | None,
    engine: TrainingEngine,
    *,
    plan: Sequence[PlannedStep] = (),
    max_tokens: int = 0,
) -> Iterator[StepBatches]:
    """Yields for each step this rank's micro-batches with their reference log-probs, on the device.

    Args:
        store: None for a loss without a reference.
        plan: All steps of the run, if `steps` are those that remain: they determine the lengths of padded rows.
        max_tokens: Limit of a row, if rows of later steps are not known yet; 0 if `steps` (or `plan`) are all.
    """
    rank = engine.ranks.rank
    flat = [pair for s in steps for pair in zip(s.micro_batches[rank], s.is_filler[rank], strict=True)]
    shared_tokens = engine.program.shares_second_tokens
    rows = (data.tokens_of_row(row) for s in plan or steps for of_rank in s.micro_batches for row in of_rank)
    lengths = row_lengths(engine, None if max_tokens else rows, max_tokens)
    batches = micro_batches(config, data, flat, engine, lengths=lengths)
    if store is not None:
        batches = (with_reference(batch, store, shared_tokens=shared_tokens) for batch in batches)
    source = on_device(batches, engine.device, engine.dtype)
    for step in steps:
        yield StepBatches(len(step.micro_batches[rank]), source, data.num_pairs(step.groups), data.lost)
