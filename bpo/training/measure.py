"""Measures the groups of a run once: lengths, pairs, reference keys; lists the unusable ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bpo.config.training import Config
from bpo.data.encode import Dropped, Encoder
from bpo.data.groups import BAD_REASONS, GroupDataset, MeasuredGroup, write_dropped
from bpo.data.lengths import MeasuredLengths, encoder_fingerprint, lengths_directory
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import read_groups
from bpo.formats.problems import PROBLEMS, Problem
from bpo.formats.schema import FLAGS
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.losses.program import LossProgram
from bpo.records import LostGroup
from bpo.training import lost
from bpo.training.lost import LostGroups

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The usable groups; `usable[i]` is the dataset index of planned group i, `measured[i]` its measurements.

    lost: those of them that became unusable later.
    """

    dataset: GroupDataset
    usable: tuple[int, ...]
    measured: tuple[MeasuredGroup, ...]
    lost: LostGroups = field(default_factory=LostGroups)

    @property
    def expected(self) -> dict[int, MeasuredGroup | None]:
        """The measurement of each dataset index; None for lost groups."""
        return {
            index: None if index in self.lost.indices else group
            for index, group in zip(self.usable, self.measured, strict=True)
        }

    @property
    def separate_reason(self) -> str | None:
        """Why completions do not share their prefix; None if they do."""
        return self.dataset.encoder.family.separate_reason

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each planned group through the language model."""
        row_tokens = self.row_tokens
        if row_tokens is None:
            return [group.num_tokens for group in self.measured]
        # A stand-in image, which a text-only batch may get, takes a row of its own.
        return [
            (group.num_completions + int(not has_image)) * length
            for group, has_image, length in zip(self.measured, self._has_image(), row_tokens, strict=True)
        ]

    @property
    def row_tokens(self) -> list[int] | None:
        """For separate sequences, the length of each planned group's longest row; None if prefixes are shared."""
        if self.separate_reason is None:
            return None
        shortest = 0 if all(self._has_image()) else len(self.dataset.stand_in.prefix_ids)
        return [
            max(group.longest_tokens, 0 if has_image else shortest)
            for group, has_image in zip(self.measured, self._has_image(), strict=True)
        ]

    @property
    def stand_in_tokens(self) -> int:
        """Tokens that a stand-in image may add to a packed batch; 0 if every group has an image."""
        needs_none = self.separate_reason is not None or all(self._has_image())
        return 0 if needs_none else len(self.dataset.stand_in.prefix_ids)

    def tokens_of_row(self, groups: Sequence[int]) -> int:
        """Tokens of the packed row of planned groups, with those of the stand-in image if none of them has an image."""
        has_image = any(self.dataset.groups[self.usable[g]].images for g in groups)
        stand_in = 0 if has_image else len(self.dataset.stand_in.prefix_ids)
        return sum(self.measured[g].num_tokens for g in groups) + stand_in

    def _has_image(self) -> list[bool]:
        return [bool(self.dataset.groups[index].images) for index in self.usable]

    def content(self) -> Iterator[str]:
        """A line per planned group with its images and tokens (as a digest), pairs, and factors other than 1."""
        for index, measured in zip(self.usable, self.measured, strict=True):
            completions = self.dataset.groups[index].completions
            parts = [f"{measured.reference_key} {measured.num_pairs}"]
            for values in ([c.weight for c in completions], [c.beta for c in completions]):
                parts += [str(values)] if any(value != 1 for value in values) else []
            for name, default in FLAGS.items():
                flags = [getattr(completion, name) for completion in completions]
                parts += [f"{name} {flags}"] if any(flag != default for flag in flags) else []
            parts += [str(c.token_weights) for c in completions if c.token_weights]
            yield " ".join(parts)

    def num_pairs(self, groups: tuple[int, ...]) -> int:
        """Pairs of planned groups, without those known to be lost."""
        return sum(self.measured[g].num_pairs for g in groups if self.usable[g] not in self.lost.indices)


def measure_groups(
    config: Config,
    encoder: Encoder,
    ranks: Ranks,
    gather: Any,
    stop: StopRequest | None = None,
    *,
    continuing: bool = False,
) -> TrainingData:
    """Encodes every group once, divided among the ranks; lists the unusable ones in dropped.jsonl.

    Args:
        continuing: Whether a checkpoint of the run is continued, with its plan.

    Raises:
        ValueError: no group is left, or a group is bad and `data.on_bad` is error.
        TooManyBadRecords: more are bad than `data.max_bad_share` allows.
        Interrupted: on all ranks, if any of them was asked to stop; measured lengths are kept (data.keep_lengths).
    """
    if not config.data.groups:
        raise ValueError("data.groups is empty; set it to the file that `bpo bootstrap` wrote")
    bad = BadRecords.from_config(config.data)
    skipped: dict[str, list[str]] = {}
    groups = read_groups(Path(config.data.groups), bad, skipped)
    dataset = GroupDataset(
        groups,
        encoder,
        max_words=config.data.max_completion_words,
        types=config.train.completion_types,
        keep_text_only=config.data.text_only == "keep",
        plan=LossProgram(config.loss, config.train.seed).plan,
        image_keys=config.may_keep_features,
    )
    _check_explored(dataset, config.data.groups)
    mine = range(ranks.rank, len(dataset), ranks.world_size)
    measured = _measured(config, encoder, dataset, mine, ranks.rank)
    results = tqdm(measured, total=len(mine), desc="measuring groups", disable=not ranks.is_main)
    everyone = _gather_measured(results, gather, stop)
    by_index = [everyone[i % ranks.world_size][i // ranks.world_size] for i in range(len(dataset))]
    output_dir = Path(config.train.output_dir)
    planned = (output_dir / lost.PLANNED, _fingerprint(config, encoder, dataset), dataset.groups)
    still_lost = lost.keep_places(*planned, by_index) if continuing else []
    dropped = [Dropped(problem.record_id or problem.where, problem.code, problem.detail) for problem in bad.problems]
    dropped += [Dropped(name, code, PROBLEMS[code].meaning) for code, names in skipped.items() for name in names]
    dropped += [group for group in by_index if isinstance(group, Dropped)]
    usable = [(i, group) for i, group in enumerate(by_index) if isinstance(group, MeasuredGroup)]
    if ranks.is_main and dropped:
        _list_dropped(output_dir, dropped, len(dataset) + len(bad.problems) + sum(map(len, skipped.values())))
    judge_dropped(bad, by_index, config.data.groups, still_lost)
    if not usable:
        first = f"; the first: {dropped[0].group_id}: {dropped[0].detail}" if dropped else ""
        raise ValueError(f"{config.data.groups}: no group can be trained on{first}")
    losses = LostGroups(output_dir / lost.FILE, config.data.groups, bad, len(dataset) + len(bad.problems))
    losses.keep(still_lost, is_main=ranks.is_main)
    if ranks.is_main and not continuing:
        lost.write_planned(*planned, by_index)
    return TrainingData(dataset, tuple(i for i, _ in usable), tuple(group for _, group in usable), losses)


def _check_explored(dataset: GroupDataset, file: str) -> None:
    """Before the hours of measuring; a group without an explored completion only lacks the term."""
    if dataset.plan.uses_explored and not any(c.explored for group in dataset.groups for c in group.completions):
        raise ValueError(
            f"{file}: the loss has a term with pairs: explored, but no completion is explored; mark the model's own "
            'answers with "explored": true (select.explored in `bpo select`), or set pairs: chosen'
        )


def _list_dropped(output_dir: Path, dropped: Sequence[Dropped], num_groups: int) -> None:
    path = output_dir / "dropped.jsonl"
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(write_dropped(dropped, path).items()))
    logger.warning("%d of %d groups cannot be used (%s); listed in %s", len(dropped), num_groups, counts, path)


def judge_dropped(
    bad: BadRecords, measured: Sequence[MeasuredGroup | Dropped], file: str, still_lost: Sequence[LostGroup] = ()
) -> None:
    """Applies `data.on_bad` and `data.max_bad_share` to groups with a bad image or record.

    Raises:
        RecordError: `bad.on_bad` is error, and a group is bad.
        TooManyBadRecords: more are bad, in reading and measuring combined, than allowed.
    """
    num_records = len(measured) + len(bad.problems)
    for group in [*measured, *still_lost]:
        if not isinstance(group, MeasuredGroup) and group.reason in BAD_REASONS:
            bad.report(Problem(BAD_REASONS[group.reason], file, group.group_id, group.detail))
    bad.check_share(num_records, file)


def _gather_measured(
    results: Iterable[MeasuredGroup | Dropped], gather: Any, stop: StopRequest | None
) -> list[list[MeasuredGroup | Dropped]]:
    """Gathers every rank's measurements, only at the end, because ranks take different times for their shares."""
    mine: list[list[Any] | dict[str, str]] = []
    stopped = False
    for result in results:
        mine.append(_to_json(result))
        stopped = stop is not None and stop.received
        if stopped:
            break
    gathered = gather((mine, stopped))
    if any(stopped for _, stopped in gathered):
        raise Interrupted(
            f"stopped by a signal while measuring; {sum(len(results) for results, _ in gathered)} groups measured"
        )
    return [[_from_json(result) for result in results] for results, _ in gathered]


def _to_json(result: MeasuredGroup | Dropped) -> list[Any] | dict[str, str]:
    """About 140 bytes per measured group as JSON."""
    if isinstance(result, Dropped):
        return asdict(result)
    return [getattr(result, entry.name) for entry in fields(MeasuredGroup)]


def _from_json(result: list[Any] | dict[str, str]) -> MeasuredGroup | Dropped:
    return Dropped(**result) if isinstance(result, dict) else MeasuredGroup(*result)


def _fingerprint(config: Config, encoder: Encoder, dataset: GroupDataset) -> str:
    keep = dataset.keep_text_only
    return encoder_fingerprint(encoder, config.data.max_completion_words, dataset.plan, keep_text_only=keep)


def _measured(
    config: Config, encoder: Encoder, dataset: GroupDataset, mine: Sequence[int], rank: int
) -> Iterator[MeasuredGroup | Dropped]:
    """Measures this rank's groups; reads those that an earlier start has measured."""
    if not config.data.keep_lengths:
        return dataset.measure_all(mine, config.data.num_workers)
    directory = lengths_directory(Path(config.data.groups), Path(config.train.output_dir))
    directory /= _fingerprint(config, encoder, dataset)
    return MeasuredLengths(directory, dataset, mine, rank).measure(config.data.num_workers)
