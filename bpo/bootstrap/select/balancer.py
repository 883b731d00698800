"""Balances the pairs of one source block by block: decides the weights of candidates, reports what that achieved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bpo.bootstrap.measure.discriminator import discriminate
from bpo.bootstrap.measure.pairs import Sample, TextPair, sample_rank
from bpo.bootstrap.select.differences import Imbalance, Rows, differences
from bpo.bootstrap.select.selection import NONE, select
from bpo.bootstrap.select.weights import solve_weights
from bpo.config.measure import MeasureConfig
from bpo.config.select import SelectConfig
from bpo.job.seeds import derive_seed

WEIGHT_DIGITS = 4
MIN_WEIGHT = 0.01  # a pair of less costs as much as any other


class Balancer:
    """The decisions for one source. A block is decided together, given the sums of the blocks before it.

    Args:
        options: `balance` is `selection` or `weights`.
        seed: Seed of the job.
        source: The source, or type of completion.
        measure: Size and seed of the sample from which the accuracy of the text is estimated.
    """

    def __init__(self, options: SelectConfig, seed: int, source: str, measure: MeasureConfig):
        self._options, self._seed, self._source, self._measure = options, seed, source, measure
        self._before, self._after, self._by_chance = Imbalance(), Imbalance(), Imbalance()
        self._sample: Sample[tuple[list[TextPair], list[TextPair]]] = Sample(measure.quick_pairs)
        self.num_records = self.num_candidates = self.num_pairs = self.num_dropped = 0
        self._sum = self._sum_of_squares = 0.0

    def decide(self, ids: Sequence[str], preferred: Sequence[str], rejected: Sequence[Sequence[str]]) -> list[Any]:
        """Weights of the candidates of each record of a block, in order: 0 for one that is not selected.

        Args:
            ids: Ids of the records.
            preferred: Their preferred answers.
            rejected: Their candidates, at least one each.
        """
        if not ids:
            return []
        per_record = [differences(text, others) for text, others in zip(preferred, rejected, strict=True)]
        rows = Rows.of([row for of_record in per_record for row in of_record])
        first_B1 = np.concatenate([[0], np.cumsum([len(of_record) for of_record in per_record])]).astype(np.int64)
        is_selection = self._options.balance == "selection"
        chance_R = np.repeat(1 / np.diff(first_B1), np.diff(first_B1)) if is_selection else np.ones(len(rows))
        self._by_chance.add(rows, chance_R, chance_R)
        before_R = np.zeros(len(rows)) if is_selection else np.ones(len(rows))
        before_R[first_B1[:-1]] = 1
        after_R = self._selected(rows, first_B1) if is_selection else self._weighted(rows)
        self._before.add(rows, before_R, before_R**2)
        self._after.add(rows, after_R, after_R**2)
        self.num_candidates += len(after_R)
        self.num_pairs += int((after_R > 0).sum())
        self._sum += float(after_R.sum())
        self._sum_of_squares += float((after_R**2).sum())
        before, after = np.split(before_R, first_B1[1:-1]), np.split(after_R, first_B1[1:-1])
        for number, (record, text) in enumerate(zip(ids, preferred, strict=True)):
            sides = [
                [
                    TextPair(record, text, other, weight=float(weight))
                    for other, weight in zip(rejected[number], weights[number], strict=True)
                    if weight
                ]
                for weights in (before, after)
            ]
            self._sample.add(sample_rank(self._measure.seed, record), record, (sides[0], sides[1]))
        return after

    def _selected(self, rows: Rows, first_B1: np.ndarray) -> np.ndarray:
        self.num_records += len(first_B1) - 1
        chosen_B = select(
            rows,
            first_B1,
            self._after.residual_F,
            self._by_chance.variance_F,
            self._by_chance.scale_F,
            np.random.default_rng(derive_seed(self._seed, "select", self._source, self.num_records)),
            int(self._options.max_dropped_share * self.num_records) - self.num_dropped,
        )
        self.num_dropped += int((chosen_B == NONE).sum())
        selected_R = np.zeros(len(rows))
        selected_R[chosen_B[chosen_B != NONE]] = 1
        return selected_R

    def _weighted(self, rows: Rows) -> np.ndarray:
        weight_R = solve_weights(
            rows,
            self._after.residual_F,
            self._by_chance.variance_F,
            self._by_chance.scale_F,
            self._options.min_effective_share,
        )
        weight_R = np.where(weight_R < MIN_WEIGHT, 0.0, weight_R)
        # Pairs of weight 0 are not trained on: the others have mean 1.
        return np.round(weight_R * (np.count_nonzero(weight_R) / weight_R.sum()), WEIGHT_DIGITS)

    def report(self) -> dict[str, Any]:
        """What the choice achieved, as JSON.

        `imbalance` is about 1 if n-grams are in preferred and rejected answers as evenly as by chance, 0 if exactly
        evenly; `accuracy` that of the text-only discriminator on a sample, each before (the first candidate, without
        weights) and after.
        """
        if not self.num_pairs:
            return {"pairs": 0}
        found: dict[str, Any] = {"balance": self._options.balance, "pairs": self.num_pairs}
        if self._options.balance == "selection":
            found["dropped_records"] = self.num_dropped
        else:
            found["mean_weight"] = round(self._sum / self.num_pairs, 4)
            found["dropped_pairs"] = self.num_candidates - self.num_pairs
            found["effective_share"] = round(self._sum**2 / (self.num_candidates * self._sum_of_squares), 4)
        found["imbalance"] = {"before": round(self._before.value, 4), "after": round(self._after.value, 4)}
        before, after = zip(*self._sample.values(), strict=True)
        accuracy = {}
        for name, of_records in (("before", before), ("after", after)):
            pairs = [pair for of_record in of_records for pair in of_record]
            if len(pairs) >= self._measure.folds:
                test = discriminate(pairs, self._measure.folds)
                accuracy[name] = round(test.accuracy, 4)
                accuracy[f"{name}_standard_error"] = round(test.standard_error, 4)
        return {**found, "accuracy": accuracy if len(accuracy) == 4 else {}}
