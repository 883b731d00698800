"""Which records get a negative from a source that is made at the merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from bpo.bootstrap.job.balance import balance_rank
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.validate import annotation_refusal
from bpo.config.training import Config
from bpo.records import Annotation

NO, YES, SURPLUS = 0, 1, 2


class Annotations(Protocol):
    """Annotations in order and by position."""

    def __iter__(self) -> Iterator[Annotation]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Annotation: ...


@dataclass(frozen=True, slots=True)
class Takers:
    """Records by what the other sources made of them.

    Attributes:
        usable: Position -> whether the record can be in a group: its annotation and its images are usable.
        missing: Position -> whether no other source made a negative.
        limits: Source -> the lowest `balance_rank` that gets none.
        truth: Objects in the images, if known.
    """

    config: Config
    annotations: Annotations
    usable: np.ndarray
    missing: np.ndarray
    limits: Mapping[str, int]
    truth: ObjectTruth | None = None

    def of(self, source: str) -> np.ndarray:
        """[number of annotations] int8: `YES` for records that should get a negative from a source, else why not."""
        options = self.config.bootstrap
        only_missing = options.swap.only_missing if source == "swap" else options.edit.only_missing
        chosen = (self.usable & self.missing if only_missing else self.usable).astype(np.int8)
        if source in self.limits:
            for position in np.flatnonzero(chosen):
                rank = balance_rank(options.seed, source, self.annotations[int(position)].id)
                chosen[position] = YES if rank < self.limits[source] else SURPLUS
        return chosen

    def without(self, served: np.ndarray) -> Takers:
        """The same, where records [number of annotations] have got a negative."""
        return replace(self, missing=self.missing & ~served)


def find_takers(
    config: Config,
    annotations: Annotations,
    others: Callable[[Annotation], Sequence[Outcome]],
    limits: Mapping[str, int],
    truth: ObjectTruth | None = None,
) -> Takers:
    """Reads all annotations with the outcomes of the other sources."""
    usable = np.zeros(len(annotations), dtype=bool)
    missing = np.zeros(len(annotations), dtype=bool)
    for position, annotation in enumerate(annotations):
        outcomes = others(annotation) if config.bootstrap.queued_sources else ()
        refused = annotation_refusal(annotation.response, max_words=config.data.max_completion_words)
        usable[position] = not refused and not any(outcome.status == "broken" for outcome in outcomes)
        missing[position] = not any(outcome.status == "kept" for outcome in outcomes)
    return Takers(config, annotations, usable, missing, limits, truth)
