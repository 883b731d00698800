"""Measures of preference groups by their texts alone, per type of rejected answers: one pass over the records.

Only samples are kept, of bounded size. They consist of the records with the lowest hashes of id and seed, so the
measures of a file do not depend on the order of its records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.completion_types import COMPLETION_TYPES
from bpo.bootstrap.measure.advice import text_warnings
from bpo.bootstrap.measure.discriminator import TextTest, by_kind, discriminate
from bpo.bootstrap.measure.drift import Drift, Features
from bpo.bootstrap.measure.hardness import Hardness, ObjectTruth, hardness
from bpo.bootstrap.measure.margins import half_nats
from bpo.bootstrap.measure.pairs import Sample, TextPair, best_completion, sample_rank, typed_pairs
from bpo.config.measure import MeasureConfig
from bpo.records import PreferenceGroup

# Fewer pairs say nothing about a type.
MIN_PAIRS = 20


@dataclass(frozen=True)
class TypeMeasures:
    """Measures of the pairs of one completion type.

    Attributes:
        num_pairs: Pairs of the file, of which the measures use a sample.
        text: Text-only discriminator; None for fewer than `MIN_PAIRS` pairs.
        by_change: Kind of change -> accuracy of the discriminator and share above 0.
        hardness: Dominating texts, false negatives, distances, refusals.
        drift: Annotations with a pair of this type against all.
        warnings: What is wrong and what to do.
    """

    num_pairs: int
    text: TextTest | None
    by_change: dict[str, dict[str, float]]
    hardness: Hardness
    drift: Drift
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON without the values of single pairs; fractions are rounded."""
        tree = asdict(self)
        if self.text is not None:
            del tree["text"]["margins"]
            # Above 0, the rejected answer looks better.
            tree["text"]["histogram"] = half_nats((-self.text.margins).tolist())
        del tree["hardness"]["kinds_of_pair"]
        return _rounded(tree)  # type: ignore[no-any-return]


@dataclass(slots=True)
class _Annotation:
    text: str
    types: set[str]


class TextMeasures:
    """Collects records, then measures them.

    Args:
        quick: Use the smaller samples of the end of `bpo bootstrap` and of `bpo check`.
        lexicon: `bootstrap.validate.lexicon`.
        truth: Objects in the images, if known.
    """

    def __init__(
        self, options: MeasureConfig, *, quick: bool = False, lexicon: str = "", truth: ObjectTruth | None = None
    ):
        self._options, self._truth = options, truth
        self._lexicon = load_lexicon(lexicon)
        self._max_pairs = options.quick_pairs if quick else options.pairs
        num_annotations = min(options.annotations, 4 * self._max_pairs) if quick else options.annotations
        self._max_diffs = min(options.diffs, max(self._max_pairs // 4, 1)) if quick else options.diffs
        self._annotations: Sample[_Annotation] = Sample(num_annotations)
        self._annotation_of: dict[str, _Annotation] | None = None
        self._pairs: dict[str, Sample[TextPair]] = {}

    def add_annotation(self, record_id: str, text: str, group: PreferenceGroup | None = None) -> None:
        """Adds one of all annotations, and its group if it is known already."""
        types = {kind for kind, _ in typed_pairs(group)} if group else set()
        self._annotations.add(sample_rank(self._options.seed, record_id), record_id, _Annotation(text, types))

    def add_group(self, group: PreferenceGroup) -> None:
        """Adds the pairs of a group."""
        rank = sample_rank(self._options.seed, group.id)
        for number, (kind, pair) in enumerate(typed_pairs(group)):
            sample = self._pairs.setdefault(kind, Sample(self._max_pairs))
            sample.add(rank, f"{group.id} {number}", pair)

    def add_kept(self, group: PreferenceGroup) -> bool | None:
        """Marks the annotation of a group as kept, after all annotations were added.

        Returns:
            Whether an annotation has this id; None if it is not in the sample.
        """
        if self._annotation_of is None:
            self._annotation_of = dict(self._annotations.items())
        if not self._annotations.accepts(sample_rank(self._options.seed, group.id)):
            return None
        found = self._annotation_of.get(group.id)
        if found is not None:
            found.types |= {kind for kind, _ in typed_pairs(group)}
        return found is not None

    def add_alone(self, group: PreferenceGroup) -> None:
        """Adds a group of a file without annotations: its best answer is the annotation."""
        self.add_annotation(group.id, best_completion(group).response, group)
        self.add_group(group)

    def measure(self, refused_share: Mapping[str, float] | None = None) -> dict[str, TypeMeasures]:
        """Type -> measures, for every type that has a pair or refusals.

        Args:
            refused_share: Type -> fraction of the source's answers that were refused, if known.
        """
        refused_share = refused_share or {}
        annotations = [annotation for _, annotation in self._annotations.items()]
        features = Features([annotation.text for annotation in annotations], self._lexicon)
        return {
            kind: self._measure_type(kind, annotations, features, refused_share.get(kind))
            for kind in sorted({*self._pairs, *refused_share})
        }

    def _measure_type(
        self, kind: str, annotations: list[_Annotation], features: Features, refused_share: float | None
    ) -> TypeMeasures:
        options = self._options
        sample = self._pairs.get(kind, Sample[TextPair](0))
        pairs = sample.values()
        hard = hardness(pairs, self._lexicon, max_diffs=self._max_diffs, truth=self._truth, refused_share=refused_share)
        is_kept = np.array([kind in annotation.types for annotation in annotations], dtype=bool)
        text = discriminate(pairs, options.folds) if len(pairs) >= max(MIN_PAIRS, options.folds) else None
        measures = TypeMeasures(
            num_pairs=sample.num_seen,
            text=text,
            by_change=by_kind(pairs, text.margins, hard.kinds_of_pair) if text else {},
            hardness=hard,
            drift=features.drift(is_kept),
        )
        measures.warnings.extend(text_warnings(kind, text, hard, measures.drift, options))
        return measures


def refused_shares(kept: Mapping[str, int], refused: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Type -> refused share of each source, from the counts of a summary; sources without an answer are left out.

    Negatives dropped for `bootstrap.target_shares` are no refusals.
    """
    shares = {}
    for source, num_kept in kept.items():
        reasons = Counter(refused.get(source, {}))
        surplus = reasons.pop("surplus", 0)
        total = num_kept + surplus + reasons.total()
        if total:
            shares[COMPLETION_TYPES.get(source, source)] = reasons.total() / total
    return shares


def measures_to_json(measures: Mapping[str, TypeMeasures]) -> dict[str, Any]:
    """Type -> JSON."""
    return {kind: found.to_json() for kind, found in measures.items()}


def all_warnings(measures: Iterable[TypeMeasures]) -> list[str]:
    """The warnings of all types."""
    return [warning for found in measures for warning in found.warnings]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
