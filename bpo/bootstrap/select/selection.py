"""Chooses one candidate per record so that the chosen pairs are balanced.

Coordinate descent on the squared imbalance beyond chance (`differences.beyond`), summed over the features. It starts
from the first candidate of every record; then records with an unbalanced n-gram exchange theirs, one after the other,
while the imbalance falls.

Shape letters as in `differences`; B records.
"""

from __future__ import annotations

import numpy as np

from bpo.bootstrap.select.differences import Rows, beyond, tolerance

MAX_PASSES = 20
_MIN_CHANGES = 0.001  # of the records in a pass; fewer end the descent
# Records are left out only for n-grams whose sum is farther from 0 than this many times the tolerance.
_FAR = 2.0
NONE = -1


def select(
    rows: Rows,
    first_B1: np.ndarray,
    residual_F: np.ndarray,
    variance_F: np.ndarray,
    scale_F: np.ndarray,
    rng: np.random.Generator,
    max_dropped: int,
) -> np.ndarray:
    """The row chosen for each record, [B]; `NONE` for a record that is left out.

    Args:
        rows: Differences of all candidates, those of a record adjacent.
        first_B1: Index of each record's first row, and R at the end; every record has at least one.
        residual_F: Sum of the differences chosen before.
        variance_F: Variance by chance of that sum after this block.
        scale_F: Weight of each feature.
        rng: Draws the order of the records.
        max_dropped: Records that may be left out.
    """
    search = _Search(rows, first_B1, residual_F, variance_F, scale_F)
    search.improve(rng)
    if max_dropped > 0:
        search.drop(max_dropped)
        search.improve(rng)
    return search.chosen_B


class _Search:
    """The current choice, and the sum of its differences."""

    def __init__(
        self,
        rows: Rows,
        first_B1: np.ndarray,
        residual_F: np.ndarray,
        variance_F: np.ndarray,
        scale_F: np.ndarray,
    ):
        self._rows, self._first_B1, self._scale_F = rows, first_B1, scale_F
        self._bound_F = tolerance(variance_F)
        self.chosen_B = first_B1[:-1].copy()
        is_chosen = np.zeros(len(rows))
        is_chosen[self.chosen_B] = 1
        self._residual_F = residual_F + rows.total(is_chosen)

    def improve(self, rng: np.random.Generator) -> None:
        """Exchanges candidates until hardly any exchange lowers the imbalance."""
        can_choose_B = np.diff(self._first_B1) > 1
        for _ in range(MAX_PASSES):
            is_beyond_F = np.abs(self._residual_F) > self._bound_F
            has_R = np.concatenate([[0], np.cumsum(self._rows.sums(is_beyond_F[self._rows.feature_E]) > 0)])
            has_B = has_R[self._first_B1[1:]] > has_R[self._first_B1[:-1]]
            records = rng.permutation(np.flatnonzero(has_B & can_choose_B & (self.chosen_B != NONE)))
            if sum(self._exchange(record) for record in records) <= _MIN_CHANGES * len(self.chosen_B):
                break

    def drop(self, max_dropped: int) -> None:
        """Leaves out the records that contribute most to imbalances far beyond chance."""
        gain_B = self._rows.dot(self._far(slice(None)) * self._scale_F)[self.chosen_B]
        for record in np.argsort(-gain_B, kind="stable"):
            if max_dropped == 0 or gain_B[record] <= 0:
                break
            entries = self._entries(self.chosen_B[record])
            features = self._rows.feature_E[entries]
            if float(self._rows.value_E[entries] @ (self._far(features) * self._scale_F[features])) > 0:
                self._add(self.chosen_B[record], -1)
                self.chosen_B[record] = NONE
                max_dropped -= 1

    def _far(self, features: slice | np.ndarray) -> np.ndarray:
        residual = self._residual_F[features]
        return np.where(np.abs(residual) > _FAR * self._bound_F[features], residual, 0.0)

    def _exchange(self, record: int) -> bool:
        """Gives a record the candidate that leaves the least imbalance; returns whether it is another one."""
        before, first = self.chosen_B[record], self._first_B1[record]
        self._add(before, -1)
        costs = self._costs(first, self._first_B1[record + 1])
        best = before if costs[before - first] == costs.min() else first + int(np.argmin(costs))
        self._add(best, 1)
        self.chosen_B[record] = best
        return bool(best != before)

    def _costs(self, first: int, end: int) -> np.ndarray:
        """How much each of some adjacent rows would add to the imbalance."""
        starts = self._rows.start_R1[first : end + 1]
        entries = slice(starts[0], starts[-1])
        features = self._rows.feature_E[entries]
        residual, bound = self._residual_F[features], self._bound_F[features]
        after = beyond(residual + self._rows.value_E[entries], bound) ** 2
        added = self._scale_F[features] * (after - beyond(residual, bound) ** 2)
        # Rounded, so that a tie, and with it the choice, does not depend on the order of the additions.
        running = np.concatenate([[0.0], np.cumsum(added)])[starts - starts[0]]
        costs: np.ndarray = np.round(np.diff(running), 12)
        return costs

    def _add(self, row: int, sign: int) -> None:
        entries = self._entries(row)
        self._residual_F[self._rows.feature_E[entries]] += sign * self._rows.value_E[entries]

    def _entries(self, row: int) -> slice:
        return slice(self._rows.start_R1[row], self._rows.start_R1[row + 1])
