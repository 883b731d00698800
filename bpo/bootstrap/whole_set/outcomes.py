"""Outcomes of the sources that are made at the merge, for records in any order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.whole_set.edit import plan_edit
from bpo.bootstrap.whole_set.swap import plan_swap
from bpo.bootstrap.whole_set.takers import Annotations, find_takers
from bpo.config.negatives import WHOLE_SET_SOURCES
from bpo.config.training import Config
from bpo.records import Annotation

Others = Callable[[Annotation], Sequence[Outcome]]


class Plan(Protocol):
    """One source's negatives of all records."""

    def outcome(self, position: int, annotation: Annotation) -> Outcome | None: ...


@dataclass(frozen=True)
class WholeSetOutcomes:
    """The outcomes of `swap` and `edit`.

    Attributes:
        plans: Source -> its negatives.
    """

    config: Config
    annotations: Annotations
    others: Others
    truth: ObjectTruth | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)

    def of(self, position: int, annotation: Annotation) -> list[Outcome]:
        """The outcomes of one record."""
        found = (plan.outcome(position, annotation) for plan in self.plans.values())
        return [outcome for outcome in found if outcome is not None]

    def within(self, limits: Mapping[str, int]) -> WholeSetOutcomes:
        """Drawn again among fewer records, so that they stay balanced; see `balance.thresholds`."""
        mine = {source: rank for source, rank in limits.items() if source in self.plans}
        return plan_whole_set(self.config, self.annotations, self.others, self.truth, mine) if mine else self


def plan_whole_set(
    config: Config,
    annotations: Annotations,
    others: Others,
    truth: ObjectTruth | None = None,
    limits: Mapping[str, int] | None = None,
) -> WholeSetOutcomes:
    """Chooses the negatives of `swap` and `edit` for all records.

    Args:
        others: The outcomes of a record from all other sources, after the refusal of duplicates, and its scores.
        truth: Objects in the images, if known: no text is given that names only these.
        limits: Source -> the lowest `balance_rank` that gets no negative.
    """
    plans: dict[str, Plan] = {}
    wanted = [source for source in WHOLE_SET_SOURCES if source in config.bootstrap.sources]
    if wanted:
        takers = find_takers(config, annotations, others, limits or {}, truth)
        if "swap" in wanted:
            plans["swap"] = swap = plan_swap(config, annotations, takers)
            takers = takers.without(swap.partner >= 0)
        if "edit" in wanted:

            def taken(position: int, annotation: Annotation) -> str | None:
                found = plans["swap"].outcome(position, annotation) if "swap" in plans else None
                return found.text if found and found.status == "kept" else None

            def scores_of(annotation: Annotation) -> Mapping[str, float] | None:
                return next((o.scores for o in others(annotation) if o.status == "scored"), None)

            plans["edit"] = plan_edit(config, annotations, takers, taken, scores_of)
    return WholeSetOutcomes(config, annotations, others, truth, plans)
