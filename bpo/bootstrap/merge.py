"""Puts finished parts together: groups in the order of the annotations, and lists of all that was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bpo.bootstrap.balance import surplus
from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.parts import Outcome, write_atomically
from bpo.bootstrap.statistics import SourceStatistics
from bpo.bootstrap.validate import REASONS, annotation_refusal, content_key
from bpo.config import Config
from bpo.data.formats import group_to_json
from bpo.records import Annotation, Completion, PreferenceGroup, Provenance

COMPLETION_TYPES = {
    "weaken": "mllm-hal",
    "inject": "llm-hal",
    "crop": "mllm-crop",
    "mask": "mllm-mask",
    "regenerate": "mllm-cont",
    "text-only": "mllm-blind",
    "unweakened": "mllm-self",
}
PROVENANCE_SOURCES = {
    "annotation": "annotation",
    "weaken": "weakened-image",
    "inject": "injected-errors",
    "crop": "cropped-image",
    "mask": "masked-image",
    "regenerate": "regenerated-end",
    "text-only": "no-image",
    "unweakened": "unweakened-image",
}


@dataclass(frozen=True, slots=True)
class BootstrapSummary:
    """What a bootstrapping job made and left out.

    Attributes:
        groups_path: The file of groups.
        num_annotations: Annotations used (after `bootstrap.limit`).
        num_groups: Groups written; None on ranks other than 0, which write none.
        kept: Source -> negatives kept.
        refused: Source -> reason -> completions refused; the source `annotation` counts records left out whole.
        num_quarantined: Lines of the quarantine file.
        num_without_negative: Annotations without any usable negative.
        skipped_annotations: Reason -> records of the annotation file that hold nothing to learn from.
        seconds: Source -> seconds that this rank took in this run.
        statistics: Source -> lengths, similarity to the annotation, objects added and dropped (`SourceStatistics`).
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


def beside(groups: Path, what: str) -> Path:
    """The file or folder that belongs to a file of groups: `groups.jsonl` -> `groups.jsonl.refused.jsonl`."""
    return groups.with_name(f"{groups.name}.{what}")


def merge(
    config: Config,
    annotations: Sequence[Annotation],
    outcomes: Mapping[tuple[str, str], Outcome],
    skipped: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
) -> BootstrapSummary:
    """Writes groups, refused completions, quarantine and summary, each file at once, the groups last.

    Raises:
        ValueError: No record has a usable negative; the lists are written all the same.
    """
    groups_path = Path(config.data.groups)
    groups, refused, quarantined = [], [], []
    judged = _judge_together(config, annotations, outcomes)
    statistics: dict[str, SourceStatistics] = {source: SourceStatistics() for source in config.bootstrap.sources}
    lexicon = load_lexicon(config.bootstrap.validate.lexicon)
    for annotation in annotations:
        of_record = judged[annotation.id]
        refused += _refusals(annotation, of_record, config.data.max_completion_words)
        quarantined += _quarantine(annotation, of_record)
        group = build_group(annotation, of_record, config.data.max_completion_words)
        groups += [group] if group else []
        for outcome in of_record if group else ():
            if outcome.status == "kept":
                statistics[outcome.source].add(annotation.response, outcome.text, lexicon)
    summary = BootstrapSummary(
        groups_path=str(groups_path),
        num_annotations=len(annotations),
        num_groups=len(groups),
        kept=_count_kept(groups, config.bootstrap.sources),
        refused=_count_refused(refused),
        num_quarantined=len(quarantined),
        num_without_negative=len(annotations) - len(groups),
        skipped_annotations={reason: len(ids) for reason, ids in skipped.items()},
        seconds={source: round(value, 3) for source, value in seconds.items()},
        statistics={source: one.to_json() for source, one in statistics.items()},
    )
    _write_lines(beside(groups_path, "refused.jsonl"), refused)
    _write_lines(beside(groups_path, "quarantine.jsonl"), quarantined)
    write_atomically(beside(groups_path, "summary.json"), json.dumps(asdict(summary), indent=2).encode() + b"\n")
    if not groups:
        first = f"; first error: {quarantined[0]['error']}" if quarantined else ""
        raise ValueError(
            f"none of {len(annotations)} annotations got a usable negative (refused: {summary.refused}, "
            f"quarantined: {len(quarantined)}{first}); read {beside(groups_path, 'refused.jsonl')}"
        )
    _write_lines(groups_path, [group_to_json(group) for group in groups])
    return summary


def build_group(annotation: Annotation, outcomes: Sequence[Outcome], max_words: int) -> PreferenceGroup | None:
    """The annotation (score 1) with its kept negatives (score 0); None without one, or for a record that is no use."""
    if annotation_refusal(annotation.response, max_words=max_words) or any(o.status == "broken" for o in outcomes):
        return None
    negatives = tuple(
        Completion(outcome.text, 0.0, COMPLETION_TYPES[outcome.source], outcome.provenance)
        for outcome in outcomes
        if outcome.status == "kept"
    )
    if not negatives:
        return None
    gt = Completion(annotation.response, 1.0, "gt", Provenance(source=PROVENANCE_SOURCES["annotation"]))
    return PreferenceGroup(annotation.id, annotation.images, annotation.prompt, (gt, *negatives), annotation.extra)


def _judge_together(
    config: Config, annotations: Sequence[Annotation], outcomes: Mapping[tuple[str, str], Outcome]
) -> dict[str, list[Outcome]]:
    """The outcomes of each record, refused where only a look at the others shows why: duplicates, and a surplus."""
    options = config.bootstrap
    judged: dict[str, list[Outcome]] = {}
    kept: dict[str, list[str]] = {}
    for annotation in annotations:
        of_record = [outcomes[key] for s in options.sources if (key := (s, annotation.id)) in outcomes]
        judged[annotation.id] = without_duplicates(of_record) if options.validate.refuse_duplicates else of_record
        if build_group(annotation, judged[annotation.id], config.data.max_completion_words):
            for outcome in judged[annotation.id]:
                if outcome.status == "kept":
                    kept.setdefault(outcome.source, []).append(annotation.id)
    detail = ", ".join(f"{source} {share:g}" for source, share in options.target_shares.items())
    for source, ids in surplus(kept, options.target_shares, options.seed).items():
        for record_id in ids:
            judged[record_id] = [
                replace(o, status="refused", reason="surplus", detail=detail) if o.source == source else o
                for o in judged[record_id]
            ]
    return judged


def without_duplicates(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of one record, in which of kept completions with the same content only the first stays kept."""
    first: dict[tuple[str, ...], str] = {}
    judged = []
    for outcome in outcomes:
        if outcome.status == "kept":
            source = first.setdefault(content_key(outcome.text), outcome.source)
            if source != outcome.source:
                detail = f"says what the negative of `{source}` says"
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
        for o in outcomes
        if o.status == "refused"
    ]


def _quarantine(annotation: Annotation, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {"file": list(annotation.images), "record": o.record_id, "source": o.source, "error": o.reason}
        for o in outcomes
        if o.status in ("broken", "failed")
    ]


def _count_kept(groups: Sequence[PreferenceGroup], sources: Sequence[str]) -> dict[str, int]:
    types = Counter(completion.type for group in groups for completion in group.completions)
    return {source: types[COMPLETION_TYPES[source]] for source in sources}


def _count_refused(refused: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for entry in refused:
        by_reason = counts.setdefault(entry["source"], {})
        by_reason[entry["reason"]] = by_reason.get(entry["reason"], 0) + 1
    return counts


def _write_lines(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects)
    write_atomically(path, "".join(lines).encode("utf-8", "surrogatepass"))
