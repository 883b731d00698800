"""What happens once before training: groups are measured, the reference log-probs are computed and stored."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bpo.config.training import Config, TrainConfig
from bpo.data.encode import Dropped, Encoder
from bpo.data.groups import BAD_REASONS, GroupDataset, MeasuredGroup, iterate_micro_batches, write_dropped
from bpo.data.lengths import MeasuredLengths, encoder_fingerprint, lengths_directory
from bpo.data.schedule import PlannedStep, plan_balance, plan_steps, split_into_micro_batches
from bpo.data.transfer import on_device
from bpo.engine import TrainingEngine, barrier, from_rank_0, gather_from_ranks
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_groups
from bpo.formats.problems import Problem
from bpo.interrupts import Interrupted, StopRequest
from bpo.launch import Ranks
from bpo.model.load import choose_attention
from bpo.model.reference.fingerprint import DIGESTS, model_fingerprint
from bpo.model.reference.format import ReferenceStoreError
from bpo.model.reference.store import ReferenceStore, open_or_create
from bpo.records import GroupBatch
from bpo_kernels.dispatch import chosen_implementation

logger = logging.getLogger(__name__)

# Above this share of waiting the plan warns and says what would level it.
MAX_IMBALANCE = 0.02


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The usable groups; `usable[i]` is the dataset index of planned group i, `measured[i]` what is known of it."""

    dataset: GroupDataset
    usable: tuple[int, ...]
    measured: tuple[MeasuredGroup, ...]

    @property
    def keys(self) -> dict[int, str]:
        return {index: one.reference_key for index, one in zip(self.usable, self.measured, strict=True)}

    @property
    def separate_reason(self) -> str | None:
        """Why completions do not share their prefix; None where they do."""
        return self.dataset.encoder.family.separate_reason

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each planned group through the language model."""
        row_tokens = self.row_tokens
        if row_tokens is None:
            return [one.num_tokens for one in self.measured]
        # The stand-in image that a text-only batch may get is a row of its own.
        return [
            (one.num_completions + int(not has_image)) * length
            for one, has_image, length in zip(self.measured, self._has_image(), row_tokens, strict=True)
        ]

    @property
    def row_tokens(self) -> list[int] | None:
        """For separate sequences, the length of each planned group's longest row; None where prefixes are shared."""
        if self.separate_reason is None:
            return None
        shortest = 0 if all(self._has_image()) else len(self.dataset.stand_in.prefix_ids)
        return [
            max(one.longest_tokens, 0 if has_image else shortest)
            for one, has_image in zip(self.measured, self._has_image(), strict=True)
        ]

    @property
    def stand_in_tokens(self) -> int:
        """What a packed batch without an image may get on top of its groups; 0 where every group has one."""
        needs_none = self.separate_reason is not None or all(self._has_image())
        return 0 if needs_none else len(self.dataset.stand_in.prefix_ids)

    def _has_image(self) -> list[bool]:
        return [bool(self.dataset.groups[index].images) for index in self.usable]

    def num_pairs(self, groups: tuple[int, ...]) -> int:
        return sum(self.measured[g].num_pairs for g in groups)


def measure_groups(
    config: Config, encoder: Encoder, ranks: Ranks, gather: Any, stop: StopRequest | None = None
) -> TrainingData:
    """Encodes every group once, divided among the ranks; lists those that cannot be used in dropped.jsonl.

    Raises:
        ValueError: no group is left, or a group is bad and `data.on_bad` is error.
        TooManyBadRecords: more are bad than `data.max_bad_share` allows.
        Interrupted: on all ranks, where any of them was asked to stop; measured lengths are kept (data.keep_lengths).
    """
    if not config.data.groups:
        raise ValueError("data.groups is empty; give the file that `bpo bootstrap` wrote")
    bad = BadRecords.of(config.data)
    groups = read_groups(Path(config.data.groups), bad)
    dataset = GroupDataset(
        groups,
        encoder,
        max_words=config.data.max_completion_words,
        types=config.train.completion_types,
        keep_text_only=config.data.text_only == "keep",
    )
    mine = range(ranks.rank, len(dataset), ranks.world_size)
    results = tqdm(
        _measured(config, encoder, dataset, mine, ranks.rank),
        total=len(mine),
        desc="measuring groups",
        disable=not ranks.is_main,
    )
    everyone = _gather_measured(results, gather, stop)
    by_index = [everyone[i % ranks.world_size][i // ranks.world_size] for i in range(len(dataset))]
    dropped = [Dropped(one.record_id or one.where, one.code, one.detail) for one in bad.problems]
    dropped += [one for one in by_index if isinstance(one, Dropped)]
    usable = [(i, one) for i, one in enumerate(by_index) if isinstance(one, MeasuredGroup)]
    if ranks.is_main and dropped:
        path = Path(config.train.output_dir) / "dropped.jsonl"
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(write_dropped(dropped, path).items()))
        total = len(dataset) + len(bad.problems)
        logger.warning("%d of %d groups cannot be used (%s); listed in %s", len(dropped), total, counts, path)
    judge_dropped(bad, by_index, config.data.groups)
    if not usable:
        first = f"; the first: {dropped[0].group_id}: {dropped[0].detail}" if dropped else ""
        raise ValueError(f"{config.data.groups}: no group can be trained on{first}")
    return TrainingData(dataset, tuple(i for i, _ in usable), tuple(one for _, one in usable))


def judge_dropped(bad: BadRecords, measured: Sequence[MeasuredGroup | Dropped], file: str) -> None:
    """Applies `data.on_bad` and `data.max_bad_share` to groups whose image or record is bad.

    Raises:
        RecordError: `bad.on_bad` is error, and a group is bad.
        TooManyBadRecords: more are bad, in reading and measuring together, than allowed.
    """
    num_records = len(measured) + len(bad.problems)
    for one in measured:
        if isinstance(one, Dropped) and one.reason in BAD_REASONS:
            bad.report(Problem(BAD_REASONS[one.reason], file, one.group_id, one.detail))
    bad.check_share(num_records, file)


def _gather_measured(
    results: Iterable[MeasuredGroup | Dropped], gather: Any, stop: StopRequest | None
) -> list[list[MeasuredGroup | Dropped]]:
    """Every rank's measurements. Ranks take different times over their shares, so they meet at the end alone."""
    mine = []
    stopped = False
    for one in results:
        mine.append(one)
        stopped = stop is not None and stop.received
        if stopped:
            break
    gathered = gather((mine, stopped))
    if any(stopped for _, stopped in gathered):
        raise Interrupted(
            f"stopped by a signal while measuring; {sum(len(one) for one, _ in gathered)} groups measured"
        )
    return [one for one, _ in gathered]


def _measured(
    config: Config, encoder: Encoder, dataset: GroupDataset, mine: Sequence[int], rank: int
) -> Iterator[MeasuredGroup | Dropped]:
    """This rank's groups, measured; what an earlier start measured is read instead."""
    if not config.data.keep_lengths:
        return dataset.measure_all(mine, config.data.num_workers)
    directory = lengths_directory(Path(config.data.groups), Path(config.train.output_dir))
    directory /= encoder_fingerprint(encoder, config.data.max_completion_words, keep_text_only=dataset.keep_text_only)
    return MeasuredLengths(directory, dataset, mine, rank).measure(config.data.num_workers)


def plan_training(config: Config, data: TrainingData, ranks: Ranks) -> list[PlannedStep]:
    """The steps of the run; logs how level they are, and warns where ranks will wait for each other."""
    num_tokens = data.num_tokens
    steps = plan_steps(
        num_tokens,
        groups_per_step=config.train.groups_per_step,
        epochs=config.train.epochs,
        seed=config.train.seed,
        world_size=ranks.world_size,
        max_tokens=max(1, config.train.max_micro_batch_tokens - data.stand_in_tokens),
        max_steps=config.train.max_steps,
        row_tokens=data.row_tokens,
    )
    if ranks.is_main:
        _report_sequences(data)
        _report_balance(config.train, steps, num_tokens, ranks.world_size)
    return steps


def _report_sequences(data: TrainingData) -> None:
    """One line where completions do not share their prefix: why, and what it costs."""
    if data.separate_reason is None:
        return
    separate, shared = sum(data.num_tokens), sum(one.num_tokens for one in data.measured)
    logger.warning(
        "separate sequences: completions do not share their prefix (%s); an epoch takes %s tokens through the language "
        "model, %.2f times the %s of shared prefixes",
        data.separate_reason,
        f"{separate:,}",
        separate / shared,
        f"{shared:,}",
    )


def _report_balance(train: TrainConfig, steps: list[PlannedStep], num_tokens: list[int], world_size: int) -> None:
    most = max(len(step.micro_batches[0]) for step in steps)
    logger.info("plan: %d steps of %d groups, up to %d micro-batches a rank", len(steps), len(steps[0].groups), most)
    if world_size == 1:
        return
    balance = plan_balance(steps, num_tokens)
    logger.info(
        "plan: the busiest of %d ranks carries %.1f %% more tokens than their mean in a step (%.1f %% at most), "
        "%.1f %% in a micro-batch (%.1f %% at most)",
        world_size,
        100 * balance.step_mean,
        100 * balance.step_largest,
        100 * balance.micro_batch_mean,
        100 * balance.micro_batch_largest,
    )
    if balance.micro_batch_mean > MAX_IMBALANCE:
        logger.warning(
            "ranks will wait for each other %.0f %% of the time: too few groups to level out; train.groups_per_step=%d "
            "is %.1f groups a rank and %.1f a micro-batch; with 8 and more of both (raise train.groups_per_step, or "
            "train.max_micro_batch_tokens=%d) ranks differ by less than %.0f %%",
            100 * balance.micro_batch_mean / (1 + balance.micro_batch_mean),
            train.groups_per_step,
            len(steps[0].groups) / world_size,
            len(steps[0].groups) / (world_size * len(steps[0].micro_batches[0])),
            train.max_micro_batch_tokens,
            100 * MAX_IMBALANCE,
        )


def fill_reference_store(
    config: Config, engine: TrainingEngine, data: TrainingData, stop: StopRequest | None = None
) -> ReferenceStore:
    """Computes what the store lacks, on the engine that will train, before its first step; every rank its share.

    Must run before a checkpoint is loaded: only the untrained policy is the reference.

    Raises:
        ReferenceStoreError: the store does not fit the run, cannot be written, or lacks entries after the pass.
        Interrupted: on all ranks, where any of them was asked to stop; what was computed is stored.
    """
    directory = Path(config.train.reference_dir or Path(config.train.output_dir) / "reference")
    fingerprint = from_rank_0(lambda: _open_store(config, engine, data, directory))
    store = ReferenceStore(directory, fingerprint, engine.ranks.rank)
    first_with_key = {one.reference_key: g for g, one in reversed(list(enumerate(data.measured)))}
    # Decided by one rank: another job may be adding to the store, and all ranks must agree on the passes to make.
    missing = from_rank_0(lambda: _missing_groups(store, first_with_key))
    barrier()  # a rank that reads later must not find what others already write
    if not missing:
        logger.info("reference store %s: complete, %d entries", directory, len(store))
        return store
    name, stopped = _reference_pass(config, engine, data, store, missing, stop)
    store.reload(gather_from_ranks(name))
    lacking = int((~store.has(list(first_with_key))).sum())
    if lacking and stopped:
        raise Interrupted(
            f"stopped by a signal in the reference pass; {lacking} of {len(first_with_key)} are to be done"
        )
    if lacking:
        raise ReferenceStoreError(f"{directory}: {lacking} entries are missing after the pass; does every node see it?")
    logger.info("reference store %s: %d entries, %d computed now", directory, len(store), len(missing))
    return store


def _open_store(config: Config, engine: TrainingEngine, data: TrainingData, directory: Path) -> dict[str, str]:
    # Another order of sums rounds differently, and the first step compares policy and reference to rounding.
    choice = choose_attention(config.model, engine.device)
    sequences = {"sequences": "separate"} if choice is None else {"attention": choice.backend}
    fingerprint = model_fingerprint(
        config.model.path,
        kept_digests=directory / DIGESTS,
        rehash=config.train.rehash_weights,
        dtype=str(engine.dtype).removeprefix("torch."),
        vision_attention=config.model.vision_attention,
        kernels=chosen_implementation(torch.empty(0, device=engine.device)),
        **sequences,
    )
    open_or_create(directory, fingerprint)
    return fingerprint


def _missing_groups(store: ReferenceStore, first_with_key: dict[str, int]) -> list[int]:
    stored = store.has(list(first_with_key)).tolist()
    return sorted(g for g, has in zip(first_with_key.values(), stored, strict=True) if not has)


def _reference_pass(
    config: Config,
    engine: TrainingEngine,
    data: TrainingData,
    store: ReferenceStore,
    missing: list[int],
    stop: StopRequest | None,
) -> tuple[str | None, bool]:
    """This rank's share of the missing groups into a shard of its own; its name, and whether `stop` cut the pass short.

    Without a backward pass no activation outlives its layer, so a micro-batch may be larger than in training.
    """
    tokens = data.num_tokens
    limit = config.train.reference_micro_batch_tokens or 4 * config.train.max_micro_batch_tokens
    # One pass over everything: what bins differ by evens out, and levelling very many of them would take long.
    plan = split_into_micro_batches(
        missing, tokens, engine.ranks.world_size, limit, level=False, row_tokens=data.row_tokens
    )
    mine = [(one or missing[:1], not one) for one in plan[engine.ranks.rank]]
    total = sum(tokens[g] for g in missing)
    logger.info("reference pass: %d groups, %s tokens, %d micro-batches a rank", len(missing), f"{total:,}", len(mine))
    started = time.perf_counter()
    share = sum(tokens[g] for groups, _ in mine for g in groups)
    hidden = not engine.ranks.is_main
    done_tokens, stopped = 0, False
    with tqdm(total=share, unit="tok", unit_scale=True, desc="reference log-probs", disable=hidden) as progress:
        for batch in on_device(micro_batches(config, data, mine, engine), engine.device, engine.dtype):
            _store_batch(store, batch, engine.reference_logp(batch))
            progress.update(batch.input_ids_T.numel())
            done_tokens += batch.input_ids_T.numel()
            # All ranks have as many micro-batches, so they agree after each, as they do after each step.
            if stop is not None and engine.sum_over_ranks([float(stop.received)])[0]:
                stopped = True
                break
    name = store.close()
    seconds = time.perf_counter() - started
    logger.info("reference pass: %.1f s, %s tokens a second a rank", seconds, f"{done_tokens / seconds:,.0f}")
    return name, stopped


def _store_batch(store: ReferenceStore, batch: GroupBatch, logp_N: torch.Tensor) -> None:
    if batch.is_filler:
        return  # its group is computed by the rank that owns it
    logp_N = logp_N.cpu()  # once a batch: each copy waits for the device
    first = 0
    # Not strict: the layout may end in a stand-in image, a prefix that is nobody's and has no completions.
    for key, spans in zip(batch.reference_keys, batch.layout.completion_spans, strict=False):
        count = sum(end - start for start, end in spans)
        store.put(key, logp_N[first : first + count])
        first += count


def micro_batches(
    config: Config, data: TrainingData, batches: list[tuple[Any, bool]], engine: TrainingEngine
) -> Iterator[GroupBatch]:
    """This rank's micro-batches, given as (planned groups, is_filler), in host memory."""
    indices = [([data.usable[g] for g in groups], is_filler) for groups, is_filler in batches]
    return iterate_micro_batches(
        data.dataset,
        data.keys,
        indices,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        pin_memory=engine.device.type == "cuda",
    )


@dataclass(frozen=True)
class StepBatches:
    """This rank's micro-batches of one step, taken from their source as they are needed; to be read once, in turn.

    A list would make the first wait for the last, and let the worker processes idle while the step is computed.
    """

    count: int
    source: Iterator[GroupBatch]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[GroupBatch]:
        return itertools.islice(self.source, self.count)


def training_batches(
    config: Config, data: TrainingData, steps: list[PlannedStep], store: ReferenceStore, engine: TrainingEngine
) -> Iterator[StepBatches]:
    """For every step, this rank's micro-batches with their reference log-probs, on the device."""
    rank = engine.ranks.rank
    flat = [pair for s in steps for pair in zip(s.micro_batches[rank], s.is_filler[rank], strict=True)]
    with_reference = (
        replace(batch, reference_logp_N=store.gather(batch.reference_keys))
        for batch in micro_batches(config, data, flat, engine)
    )
    source = on_device(with_reference, engine.device, engine.dtype)
    for step in steps:
        yield StepBatches(len(step.micro_batches[rank]), source)
