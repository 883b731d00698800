"""Which candidates of a job's outcomes become negatives, decided at the merge from seed, records and options alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from bpo.bootstrap.completion_types import candidate_keys
from bpo.bootstrap.job.outcomes import Outcome, Outcomes, record_digest
from bpo.bootstrap.select.balancer import WEIGHT_DIGITS, Balancer
from bpo.bootstrap.validate import REASONS, annotation_refusal, content_key
from bpo.config.bootstrap import CANDIDATE_SOURCES
from bpo.config.training import Config
from bpo.records import Annotation

Content = tuple[str, ...]


@dataclass
class ChosenOutcomes:
    """The outcomes of a job after the choice among candidates.

    Attributes:
        report: Source -> what the choice achieved (`Balancer.report`); empty without `bootstrap.select.balance`.
    """

    config: Config
    outcomes: Outcomes
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    _digests: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))  # sorted
    _weights: dict[str, np.ndarray] = field(default_factory=dict)  # source -> [records, candidates], in that order

    def of(self, annotation: Annotation) -> list[Outcome]:
        """The outcomes of one record in the order of the sources, each named by its source.

        Equal candidates are refused as duplicates, those not chosen as `not-selected`; the others have their weight.
        Without a choice: the scores of `edit`.
        """
        scored = self.outcomes.get(("edit", annotation.id)) if "edit" in self.config.bootstrap.queued_sources else None
        return self._of_generated(annotation) + ([scored] if scored else [])

    def _of_generated(self, annotation: Annotation) -> list[Outcome]:
        options = self.config.bootstrap
        if options.select.candidates == 1 and not self._weights:
            return [o for source in options.generated_sources for o in self._without_choice(annotation.id, source)]
        judged: list[Outcome] = []
        taken: dict[Content, str] = {}
        place = int(np.searchsorted(self._digests, _digest(annotation.id)))
        known = place < len(self._digests) and self._digests[place] == _digest(annotation.id)
        for source in options.generated_sources:
            if source in CANDIDATE_SOURCES:
                judged += self._without_choice(annotation.id, source)
                continue
            candidates = self._candidates(annotation.id, source, taken)
            weights = self._weights[source][place] if known else np.arange(options.select.candidates) == 0
            judged += _weighted(candidates, weights, taken)
        return judged

    def _without_choice(self, record_id: str, source: str) -> list[Outcome]:
        """The outcome of a source's first candidate, or all candidates of a judge that differ."""
        if source in CANDIDATE_SOURCES:
            return self._candidates(record_id, source, {})
        outcome = self.outcomes.get((source, record_id))
        return [outcome] if outcome else []

    def decide(self, annotations: Iterable[Annotation]) -> None:
        """Reads all candidates once, in blocks, and decides their weights; 8 + 4 K bytes per record are kept."""
        options = self.config.bootstrap
        balancers = {
            source: Balancer(options.select, options.seed, source, self.config.measure)
            for source in options.generated_sources
            if source not in CANDIDATE_SOURCES
        }
        digests: list[np.ndarray] = []
        weights: dict[str, list[np.ndarray]] = {source: [] for source in balancers}
        for block in _blocks(annotations, options.select.block_records):
            digests.append(np.array([_digest(annotation.id) for annotation in block], dtype=np.uint64))
            taken: list[dict[Content, str]] = [{} for _ in block]
            for source, balancer in balancers.items():
                weights[source].append(self._decide_block(block, source, balancer, taken))
        joined = np.concatenate([*digests, np.zeros(0, dtype=np.uint64)])
        order = np.argsort(joined, kind="stable")
        self._digests = joined[order]
        self._weights = {source: np.concatenate(parts)[order] for source, parts in weights.items() if parts}
        self.report = {source: balancer.report() for source, balancer in balancers.items()}

    def _decide_block(
        self, block: Sequence[Annotation], source: str, balancer: Balancer, taken: Sequence[dict[Content, str]]
    ) -> np.ndarray:
        """Weights [records of the block, candidates]; adds the contents that are kept to `taken`."""
        weights = np.zeros((len(block), self.config.bootstrap.select.candidates), dtype=np.float32)
        places: list[int] = []
        candidates: list[list[Outcome]] = []
        for place, annotation in enumerate(block):
            if annotation_refusal(annotation.response, max_words=self.config.data.max_completion_words):
                continue
            of_record = self._candidates(annotation.id, source, taken[place])
            if any(outcome.status == "kept" for outcome in of_record):
                places.append(place)
                candidates.append(of_record)
        rejected = [[outcome.text for outcome in of_record if outcome.status == "kept"] for of_record in candidates]
        ids = [block[place].id for place in places]
        decided = balancer.decide(ids, [block[place].response for place in places], rejected)
        for place, of_record, of_candidates in zip(places, candidates, decided, strict=True):
            weights[place, : len(of_candidates)] = of_candidates
            _weighted(of_record, of_candidates, taken[place])
        return weights

    def _candidates(self, record_id: str, source: str, taken: dict[Content, str]) -> list[Outcome]:
        """The outcomes of one source for one record; of kept ones with the same content only the first stays kept.

        Args:
            taken: Content -> source of the negatives that earlier sources made for the record.
        """
        options = self.config.bootstrap
        first: dict[Content, int] = {}
        judged = []
        for number, key in enumerate(candidate_keys(source, options.num_candidates(source))):
            outcome = self.outcomes.get((key, record_id))
            if outcome is None:
                continue
            outcome = replace(outcome, source=source)
            if outcome.status == "broken":
                return [outcome]  # for every candidate: the record itself is unusable
            if outcome.status == "kept":
                content, detail = content_key(outcome.text), ""
                if first.setdefault(content, number) != number:
                    detail = f"same content as candidate {first[content]} of `{source}`"
                elif options.validate.refuse_duplicates and content in taken:
                    detail = f"same content as the negative of `{taken[content]}`"
                if detail:
                    outcome = replace(outcome, status="refused", reason="duplicate", detail=detail)
            judged.append(outcome)
        return judged


def choose(config: Config, annotations: Iterable[Annotation], outcomes: Outcomes) -> ChosenOutcomes:
    """The choice of `bootstrap.select` among all outcomes."""
    chosen = ChosenOutcomes(config, outcomes)
    if config.bootstrap.select.balance != "none":
        chosen.decide(annotations)
    return chosen


def _weighted(candidates: Sequence[Outcome], weights: Iterable[float], taken: dict[Content, str]) -> list[Outcome]:
    """Gives the kept candidates their weights, in order, and adds their contents to `taken`."""
    of_kept = iter(weights)
    judged = []
    for outcome in candidates:
        if outcome.status == "kept":
            weight = float(next(of_kept))
            if weight:
                taken.setdefault(content_key(outcome.text), outcome.source)
                outcome = replace(outcome, weight=round(weight, WEIGHT_DIGITS))
            else:
                outcome = replace(outcome, status="refused", reason="not-selected", detail=REASONS["not-selected"])
        judged.append(outcome)
    return judged


def _blocks(annotations: Iterable[Annotation], size: int) -> Iterator[list[Annotation]]:
    stream = iter(annotations)
    while block := list(islice(stream, size)):
        yield block


def _digest(record_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(record_digest(record_id)[:8], "big"))
