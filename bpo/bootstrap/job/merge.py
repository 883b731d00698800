"""Merges the outcomes of a job: groups in the order of the annotations, and lists of everything left out."""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.completion_types import COMPLETION_TYPES, PROVENANCE_SOURCES
from bpo.bootstrap.job.balance import balance_rank, thresholds
from bpo.bootstrap.job.outcomes import Outcome, Outcomes
from bpo.bootstrap.job.statistics import SourceStatistics
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.measure.text import TextMeasures, all_warnings, measures_to_json, refused_shares
from bpo.bootstrap.select.choice import ChosenOutcomes, choose
from bpo.bootstrap.validate import REASONS, annotation_refusal, content_key
from bpo.bootstrap.whole_set.outcomes import WholeSetOutcomes, plan_whole_set
from bpo.bootstrap.whole_set.takers import Annotations
from bpo.config.bootstrap import CANDIDATE_SOURCES
from bpo.config.training import Config
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import group_to_json
from bpo.job.durable import replacing, write_durably
from bpo.job.journal import to_line
from bpo.records import Annotation, Completion, PreferenceGroup, Provenance

logger = logging.getLogger(__name__)

# Statistics sample about this many groups, evenly spaced: sampling a group takes several times as long as merging it.
STATISTICS_RECORDS = 20_000


@dataclass(frozen=True, slots=True)
class BootstrapSummary:
    """Results of a bootstrapping job.

    Attributes:
        groups_path: The file of groups.
        num_annotations: Annotations used (after `bootstrap.limit`).
        num_groups: Groups written; None on ranks other than 0, which write none.
        kept: Source -> negatives kept.
        refused: Source -> reason -> completions refused; the source `annotation` counts records dropped entirely.
        num_quarantined: Lines of the quarantine file.
        num_without_negative: Annotations without any usable negative; in a partial merge, also unfinished ones.
        skipped_annotations: Reason -> records of the annotation file without anything to learn from.
        seconds: Source -> seconds spent by this rank in this run.
        statistics: Source -> lengths, similarity to the annotation, objects added and dropped (`SourceStatistics`).
        measures: Completion type -> what the texts give away, drift, warnings (`bpo.bootstrap.measure.text`).
        selection: Source -> what `bootstrap.select.balance` achieved (`Balancer.report`).
        partial: Whether outcomes were missing (`bpo merge --partial`).
        unfinished: In a partial merge, source -> records without an outcome.
    """

    groups_path: str
    num_annotations: int
    num_groups: int | None
    kept: dict[str, int]
    refused: dict[str, dict[str, int]]
    num_quarantined: int
    num_without_negative: int
    skipped_annotations: dict[str, int]
    seconds: dict[str, float]
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    selection: dict[str, dict[str, Any]] = field(default_factory=dict)
    partial: bool = False
    unfinished: dict[str, int] = field(default_factory=dict)


def sibling_path(groups: Path, what: str) -> Path:
    """The file or folder that belongs to a file of groups: `groups.jsonl` -> `groups.jsonl.refused.jsonl`."""
    return groups.with_name(f"{groups.name}.{what}")


def merge(
    config: Config,
    annotations: Annotations,
    outcomes: Outcomes,
    skipped: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
    bad: BadRecords,
    unfinished: Mapping[str, int] | None = None,
    truth: ObjectTruth | None = None,
) -> BootstrapSummary:
    """Writes groups, refused completions, quarantine and summary, each file atomically, the groups last.

    Works record by record: memory does not grow with their number.

    Args:
        bad: Records of the annotation file that could not be read; they are listed with the broken ones.
        unfinished: Of a partial merge: source -> records without an outcome.
        truth: Objects in the images, if known: `swap` and `edit` avoid texts that are true by it.

    Raises:
        ValueError: No record has a usable negative; the lists are still written.
        TooManyBadRecords: More records are bad than `data.max_bad_share` allows; the lists are still written.
    """
    path = Path(config.data.groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    refused_path, quarantine_path = sibling_path(path, "refused.jsonl"), sibling_path(path, "quarantine.jsonl")
    made = _Made(config, len(annotations), truth)
    with replacing(path) as groups:
        with replacing(refused_path) as refused, replacing(quarantine_path) as quarantine:
            for entry in _unreadable(bad):
                made.count_quarantined(entry)
                quarantine.write(to_line(entry, ensure_ascii=False))
            chosen = choose(config, annotations, outcomes)
            for annotation, of_record in _judged(config, annotations, chosen, truth):
                for refusal in _refusals(annotation, of_record, config.data.max_completion_words):
                    made.count_refused(refusal)
                    refused.write(to_line(refusal, ensure_ascii=False))
                for entry in _quarantine(annotation, of_record):
                    made.count_quarantined(entry)
                    quarantine.write(to_line(entry, ensure_ascii=False))
                made.num_broken += any(outcome.status == "broken" for outcome in of_record)
                group = build_group(annotation, of_record, config.data.max_completion_words)
                made.count(annotation, of_record, group)
                if group:
                    groups.write(to_line(group_to_json(group), ensure_ascii=False))
            summary = replace(
                made.summary(skipped, seconds),
                selection=chosen.report,
                partial=unfinished is not None,
                unfinished=dict(unfinished or {}),
            )
        write_durably(sibling_path(path, "summary.json"), json.dumps(asdict(summary), indent=2) + "\n")
        made.check_any_group(summary)
        made.check_share(bad)
    return summary


class _Made:
    """Counts of a merge."""

    def __init__(self, config: Config, num_annotations: int, truth: ObjectTruth | None):
        self.config, self.num_annotations = config, num_annotations
        self.num_groups = self.num_quarantined = self.num_broken = 0
        self.kept: Counter[str] = Counter({source: 0 for source in config.bootstrap.sources})
        self.refused: dict[str, dict[str, int]] = {}
        self.first_error = ""
        self._lexicon = load_lexicon(config.bootstrap.validate.lexicon)
        self._every = max(1, -(-num_annotations // STATISTICS_RECORDS))
        self._statistics = {source: SourceStatistics(self._every) for source in self.kept}
        lexicon = config.bootstrap.validate.lexicon
        self.measures = TextMeasures(config.measure, quick=True, lexicon=lexicon, truth=truth)

    def count_refused(self, entry: Mapping[str, Any]) -> None:
        by_reason = self.refused.setdefault(entry["source"], {})
        by_reason[entry["reason"]] = by_reason.get(entry["reason"], 0) + 1

    def count_quarantined(self, entry: Mapping[str, Any]) -> None:
        self.num_quarantined += 1
        self.first_error = self.first_error or f"; first error: {entry['error']}"

    def count(self, annotation: Annotation, outcomes: Sequence[Outcome], group: PreferenceGroup | None) -> None:
        negatives = _without_candidates(group) if group else None
        self.measures.add_annotation(annotation.id, annotation.response, negatives)
        if group is None or negatives is None:
            return
        self.measures.add_group(negatives)
        self.num_groups += 1
        for outcome in outcomes:
            if outcome.status == "kept":
                self.kept[outcome.source] += 1
                if self.num_groups % self._every == 0:
                    self._statistics[outcome.source].add(annotation.response, outcome.text, self._lexicon)

    def summary(self, skipped: Mapping[str, Sequence[str]], seconds: Mapping[str, float]) -> BootstrapSummary:
        measured = self.measures.measure(refused_shares(self.kept, self.refused))
        for warning in all_warnings(measured.values()):
            logger.warning("%s", warning)
        return BootstrapSummary(
            groups_path=self.config.data.groups,
            num_annotations=self.num_annotations,
            num_groups=self.num_groups,
            kept=dict(self.kept),
            refused=self.refused,
            num_quarantined=self.num_quarantined,
            num_without_negative=self.num_annotations - self.num_groups,
            skipped_annotations={reason: len(ids) for reason, ids in skipped.items()},
            seconds={source: round(value, 3) for source, value in seconds.items()},
            statistics={source: found.to_json() for source, found in self._statistics.items()},
            measures=measures_to_json(measured),
        )

    def check_share(self, bad: BadRecords) -> None:
        num_bad = self.num_broken + len(bad.problems)
        listed = sibling_path(Path(self.config.data.groups), "quarantine.jsonl")
        what = f"{self.config.data.annotations} (listed in {listed})"
        bad.check_share(self.num_annotations + len(bad.problems), what, num_bad)

    def check_any_group(self, summary: BootstrapSummary) -> None:
        if not self.num_groups:
            raise ValueError(
                f"none of {self.num_annotations} annotations got a usable negative (refused: {summary.refused}, "
                f"quarantined: {self.num_quarantined}{self.first_error}); "
                f"read {sibling_path(Path(self.config.data.groups), 'refused.jsonl')}"
            )


def build_group(annotation: Annotation, outcomes: Sequence[Outcome], max_words: int) -> PreferenceGroup | None:
    """The annotation (score 1) with its kept negatives (score 0); None without negatives or for an unusable record."""
    if annotation_refusal(annotation.response, max_words=max_words) or any(o.status == "broken" for o in outcomes):
        return None
    negatives = tuple(
        Completion(outcome.text, 0.0, COMPLETION_TYPES[outcome.source], outcome.provenance, weight=outcome.weight)
        for outcome in outcomes
        if outcome.status == "kept"
    )
    if not negatives:
        return None
    gt = Completion(annotation.response, 1.0, "gt", Provenance(source=PROVENANCE_SOURCES["annotation"]))
    return PreferenceGroup(annotation.id, annotation.images, annotation.prompt, (gt, *negatives), annotation.extra)


def _without_candidates(group: PreferenceGroup) -> PreferenceGroup:
    """Without candidates of a judge: until it has scored them, they are in no pair to be measured."""
    types = {COMPLETION_TYPES[source] for source in CANDIDATE_SOURCES}
    return replace(group, completions=tuple(c for c in group.completions if c.type not in types))


def _judged(
    config: Config, annotations: Annotations, outcomes: ChosenOutcomes, truth: ObjectTruth | None
) -> Iterator[tuple[Annotation, list[Outcome]]]:
    """Each record with its outcomes, after refusals that depend on other outcomes: duplicates and a surplus."""
    options = config.bootstrap
    detail = ", ".join(f"{source} {share:g}" for source, share in options.target_shares.items())
    whole_set = plan_whole_set(config, annotations, lambda annotation: _of_record(config, annotation, outcomes), truth)
    left_out = _left_out(config, annotations, outcomes, whole_set) if options.target_shares else {}
    whole_set = whole_set.within(left_out)
    for position, annotation in enumerate(annotations):
        judged = []
        for outcome in _of_record(config, annotation, outcomes, whole_set.of(position, annotation)):
            threshold = None if outcome.source in whole_set.plans else left_out.get(outcome.source)
            if outcome.status == "kept" and threshold is not None:
                if balance_rank(options.seed, outcome.source, annotation.id) >= threshold:
                    outcome = replace(outcome, status="refused", reason="surplus", detail=detail)
            judged.append(outcome)
        yield annotation, judged


def _left_out(
    config: Config, annotations: Annotations, outcomes: ChosenOutcomes, whole_set: WholeSetOutcomes
) -> dict[str, int]:
    """`thresholds` of the sources' negatives, in a separate pass."""
    options = config.bootstrap
    ranks = {source: array("Q") for source in options.target_shares}
    for position, annotation in enumerate(annotations):
        of_record = _of_record(config, annotation, outcomes, whole_set.of(position, annotation))
        if build_group(annotation, of_record, config.data.max_completion_words):
            for outcome in of_record:
                if outcome.status == "kept" and outcome.source in ranks:
                    ranks[outcome.source].append(balance_rank(options.seed, outcome.source, annotation.id))
    return thresholds(ranks, options.target_shares)


def _of_record(
    config: Config, annotation: Annotation, outcomes: ChosenOutcomes, of_whole_set: Sequence[Outcome] = ()
) -> list[Outcome]:
    """The outcomes of one record in the order of the sources, after the refusal of duplicates."""
    # Of duplicates, the negative of a whole-set source stays: without it, the set would not be balanced.
    of_record = [*of_whole_set, *outcomes.of(annotation)]
    judged = without_duplicates(of_record) if config.bootstrap.validate.refuse_duplicates else of_record
    place = {str(source): number for number, source in enumerate(config.bootstrap.sources)}
    return sorted(judged, key=lambda outcome: place[outcome.source])


def without_duplicates(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of one record; of kept negatives with the same content, only the first stays kept.

    A candidate of a judge stays even if a negative says the same: `greedy` is wanted for itself.
    """
    first: dict[tuple[str, ...], str] = {}
    judged = []
    for outcome in outcomes:
        if outcome.status == "kept" and outcome.source not in CANDIDATE_SOURCES:
            # Candidates of one source that are kept differ already.
            source = first.setdefault(content_key(outcome.text), outcome.source)
            if source != outcome.source:
                detail = f"same content as the negative of `{source}`"
                outcome = replace(outcome, status="refused", reason="duplicate", detail=detail)
        judged.append(outcome)
    return judged


def _refusals(annotation: Annotation, outcomes: Sequence[Outcome], max_words: int) -> list[dict[str, Any]]:
    reason = annotation_refusal(annotation.response, max_words=max_words)
    if reason:
        refused = {"id": annotation.id, "source": "annotation", "reason": reason, "detail": REASONS[reason]}
        return [refused | {"text": annotation.response}]
    return [
        {"id": o.record_id, "source": o.source, "reason": o.reason, "detail": o.detail, "text": o.text}
        | ({"candidate": o.provenance.candidate} if o.provenance and o.provenance.candidate else {})
        for o in outcomes
        if o.status == "refused"
    ]


def _unreadable(bad: BadRecords) -> Iterator[dict[str, Any]]:
    for problem in bad.problems:
        yield {"file": [], "record": problem.record_id, "source": "annotation", "error": problem.detail}


def _quarantine(annotation: Annotation, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {"file": list(annotation.images), "record": o.record_id, "source": o.source, "error": o.reason}
        for o in outcomes
        if o.status in ("broken", "failed")
    ]
