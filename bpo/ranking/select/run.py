"""The selection job: reads candidates and judgements, writes groups, quarantine and summary."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bpo.bootstrap.measure.pairs import sample_rank
from bpo.config.io import check_inputs
from bpo.config.training import Config
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import group_to_json, iterate_groups
from bpo.formats.problems import RecordError
from bpo.formats.reading import SeenIds
from bpo.job.durable import replacing, write_durably
from bpo.job.journal import to_line
from bpo.job.seeds import derive_seed
from bpo.model.weights import policy_fingerprint
from bpo.ranking.judgements import read_judgements
from bpo.ranking.select.groups import Choice, check_policy, choose, groups_of
from bpo.ranking.select.rules import Pair, balance_lengths
from bpo.records import PreferenceGroup

logger = logging.getLogger(__name__)

MIXED = "replay:"  # start of the ids of groups that were mixed in


@dataclass
class SelectSummary:
    """Results of a selection, also written to GROUPS.summary.json.

    Groups and pairs are counted without those mixed in (`mixed`, by file), pairs by type of the rejected answer, and
    records without a pair (`dropped`) by reason. `means` has (number, mean) of scores by type, and of the characters of
    both sides of pairs, before and after lengths are balanced.
    """

    judge: dict[str, Any] = field(default_factory=dict)
    num_records: int = 0
    num_groups: int = 0
    num_pairs: int = 0
    pairs_by_type: Counter[str] = field(default_factory=Counter)
    means: dict[str, tuple[int, float]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    num_quarantined: int = 0
    mixed: list[int] = field(default_factory=list)

    def observe(self, name: str, value: float) -> None:
        count, mean = self.means.get(name, (0, 0.0))
        self.means[name] = count + 1, mean + (value - mean) / (count + 1)


def run_select(config: Config) -> SelectSummary:
    """Writes the groups of the selected pairs to data.groups, last of all, with quarantine and summary next to it.

    The candidates are read twice if lengths are balanced; memory then grows by 64 bytes per pair. Raises ValueError if
    an input cannot be used, a record has no judgement or another policy's answer, or there is no pair (quarantine and
    summary are then written).
    """
    options, path = config.select, Path(config.data.groups)
    check_inputs(config, ("select.candidates",))
    inputs = [Path(name).resolve() for name in (options.candidates, *(mixture.groups for mixture in options.mixture))]
    if not config.data.groups.strip() or path.resolve() in inputs:
        raise ValueError(f"data.groups is {config.data.groups!r}; name a file of its own for the selected groups")
    path.parent.mkdir(parents=True, exist_ok=True)
    selection, ids = _Selection(config), SeenIds()
    with replacing(path) as file:
        for group in itertools.chain(selection.selected(), selection.mixed()):
            line = json.dumps(group_to_json(replace(group, id=ids.unused(group.id))), ensure_ascii=False)
            file.write(line.encode("utf-8", "replace") + b"\n")  # a judge's details may have half surrogate pairs
        summary = selection.write_reports(path)
        found = f"{summary.num_pairs} pairs in {summary.num_groups} groups, {sum(summary.mixed)} groups mixed in"
        found += f"; {summary.num_records} records, without a pair: {dict(summary.dropped) or 'none'}"
        if not summary.num_pairs:
            raise ValueError(f"{found}; generate more candidates, use another judge, or relax the options of select")
    logger.info("%s: %s", path, found)
    return summary


class _Selection:
    """Reads candidates with their judgements, and counts what becomes of them."""

    def __init__(self, config: Config):
        self.config, self.options, policy = config, config.select, config.select.policy
        self.policy = policy if re.fullmatch("([0-9a-f]{16}|hub:.*)?", policy) else policy_fingerprint(policy)
        self.bad, self.unusable = BadRecords.from_config(config.data), list[dict[str, Any]]()
        self.judgements = read_judgements(Path(config.select.judgements)) if config.select.judgements else None
        self.summary = SelectSummary(self.judgements.identity if self.judgements else {})

    def selected(self) -> Iterator[PreferenceGroup]:
        """The groups of the selected pairs."""
        kept = iter(self._within_lengths()) if self.options.length == "balance" else itertools.repeat(True)
        for choice in self._choices(self.bad):
            pairs = [pair for pair, keep in zip(choice.pairs, kept, strict=False) if keep]
            try:
                made = list(groups_of(choice, pairs, self.options))
            except RecordError as error:
                made, pairs, choice = [], [], replace(choice, reason="sentence not found", detail=str(error))
            self._count(choice, pairs)
            self.summary.num_groups += len(made)
            yield from made

    def _count(self, choice: Choice, pairs: Sequence[Pair]) -> None:
        summary, completions = self.summary, choice.group.completions
        summary.num_records += 1
        summary.num_pairs += len(pairs)
        summary.pairs_by_type.update(completions[j].type for _, j in pairs)
        summary.dropped.update([] if pairs else [choice.reason or "length"])
        for completion, score in zip(completions, choice.scores, strict=False):
            summary.observe(f"score of {completion.type}", score)
        for when, of_record in ((" before balancing", choice.pairs), ("", pairs)):
            for side, k in (item for pair in of_record for item in zip(("preferred", "rejected"), pair, strict=True)):
                summary.observe(f"characters of {side}{when}", len(completions[k].response))
        if choice.detail:
            self.unusable.append({"record": choice.group.id, "code": choice.reason, "error": choice.detail})

    def mixed(self) -> Iterator[PreferenceGroup]:
        """The groups with the lowest ranks by seed and id of each file of `select.mixture`, without its own mixture."""
        for number, mixture in enumerate(self.options.mixture):
            path, seed = Path(mixture.groups), derive_seed(self.options.seed, "mixture", number)
            names = (group.id for group in iterate_groups(path, BadRecords.from_config(self.config.data)))
            ranks = sorted(sample_rank(seed, name) for name in names if not name.startswith(MIXED))
            drawn = set(ranks[: round(mixture.share * self.summary.num_groups)])
            self.summary.mixed.append(len(drawn))
            for group in iterate_groups(path, self.bad):
                if sample_rank(seed, group.id) in drawn:
                    yield replace(group, id=f"{MIXED}{group.id}")

    def write_reports(self, groups: Path) -> SelectSummary:
        entries = self.unusable + [problem.to_json() for problem in self.bad.problems]
        self.summary.num_quarantined = len(entries)
        lines = b"".join(to_line(entry, ensure_ascii=False) for entry in entries)
        write_durably(groups.with_name(f"{groups.name}.quarantine.jsonl"), lines)
        write_durably(groups.with_name(f"{groups.name}.summary.json"), json.dumps(vars(self.summary), indent=2))
        return self.summary

    def _choices(self, bad: BadRecords) -> Iterator[Choice]:
        """Every record with its pairs, before lengths are balanced."""
        for group in iterate_groups(Path(self.options.candidates), bad):
            if self.policy:
                check_policy(group, self.policy, self.options.candidates)
            result = self.judgements.of(group) if self.judgements else None
            if self.judgements and result is None:
                raise ValueError(f"{self.options.judgements}: no judgement of {group.id!r}; run bpo rank again")
            yield choose(group, result, self.options)

    def _within_lengths(self) -> np.ndarray:
        """For each pair of all records, whether it is kept to balance lengths."""
        seed = derive_seed(self.options.seed, "length")
        rows = (
            (*(len(choice.group.completions[k].response) for k in pair), sample_rank(seed, choice.group.id))
            for choice in self._choices(BadRecords.from_config(self.config.data))
            for pair in choice.pairs
        )
        table = np.fromiter(rows, dtype=[("chosen", "u4"), ("rejected", "u4"), ("rank", "u8")])
        return balance_lengths(table["chosen"], table["rejected"], table["rank"])
