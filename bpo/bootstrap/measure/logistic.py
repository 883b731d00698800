"""Sparse logistic regression on differences of n-grams, in numpy.

A pair has one row: +1 for each n-gram that only its preferred answer has, -1 for each that only the rejected one has.
The score of a row, its log-odds, is the score of the preferred minus that of the rejected text, each the sum of the
weights of its distinct n-grams. The problem is convex and there is no intercept, so a set in which each n-gram is
preferred as often as rejected has the solution 0.

Shape letters: P pairs, C n-grams (columns), Z non-zero entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bpo.bootstrap.measure.ngrams import ngram_ids
from bpo.bootstrap.measure.pairs import TextPair

# N-grams that fewer pairs change are left out: they would identify texts instead of describing them.
MIN_PAIRS = 4

_L2 = 10.0
_MAX_STEPS = 40
_MEMORY = 8
# Of the largest gradient: relative to the first one, and per pair.
_TOLERANCE, _TOLERANCE_PER_PAIR = 1e-3, 1e-4


@dataclass(frozen=True)
class Differences:
    """Differences of n-grams as a sparse matrix [P, C] in row order.

    Attributes:
        row_Z, column_Z, value_Z: The non-zero entries, each +-1.
        id_C: Id (`ngram_ids`) of each column.
        num_pairs: P.
    """

    row_Z: np.ndarray
    column_Z: np.ndarray
    value_Z: np.ndarray
    id_C: np.ndarray
    num_pairs: int

    def counts(self, weight_P: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Number (weight) of pairs in which only the preferred, and only the rejected answer has each n-gram: [C]."""
        weight_Z = np.ones(len(self.row_Z)) if weight_P is None else weight_P[self.row_Z]
        preferred, rejected = (
            np.bincount(self.column_Z, np.where(side, weight_Z, 0.0), len(self.id_C))
            for side in (self.value_Z > 0, self.value_Z < 0)
        )
        return preferred, rejected

    def scores(self, weight_C: np.ndarray) -> np.ndarray:
        """[P] float64."""
        return np.bincount(self.row_Z, self.value_Z * weight_C[self.column_Z], self.num_pairs)

    def gradient(self, residual_P: np.ndarray) -> np.ndarray:
        """The transposed product: [C] float64."""
        return np.bincount(self.column_Z, self.value_Z * residual_P[self.row_Z], len(self.id_C))


def differences(pairs: Sequence[TextPair], bits: int = 18, min_pairs: int = MIN_PAIRS) -> Differences:
    """The differences of each pair; n-grams changed by fewer than `min_pairs` pairs are left out."""
    rows, ids, values = [], [], []
    for number, pair in enumerate(pairs):
        preferred, rejected = np.unique(ngram_ids(pair.preferred, bits)), np.unique(ngram_ids(pair.rejected, bits))
        for own, other, value in ((preferred, rejected, 1.0), (rejected, preferred, -1.0)):
            only = own[~_isin_sorted(own, other)]
            rows.append(np.full(len(only), number, dtype=np.int32))
            ids.append(only)
            values.append(np.full(len(only), value, dtype=np.float32))
    if not pairs:
        empty = np.zeros(0, dtype=np.int64)
        return Differences(empty, empty, empty.astype(np.float32), empty, 0)
    row_Z, id_Z, value_Z = np.concatenate(rows), np.concatenate(ids), np.concatenate(values)
    changed = np.bincount(id_Z, minlength=1 << bits)
    id_C = np.flatnonzero(changed >= min_pairs)
    column_of_id = np.full(1 << bits, -1, dtype=np.int64)
    column_of_id[id_C] = np.arange(len(id_C))
    column_Z = column_of_id[id_Z]
    kept = column_Z >= 0
    return Differences(row_Z[kept], column_Z[kept], value_Z[kept], id_C, len(pairs))


def _isin_sorted(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether each value is in the sorted, non-empty array `among`."""
    place = np.minimum(np.searchsorted(among, values), len(among) - 1)
    found: np.ndarray = among[place] == values
    return found


def fit_logistic(rows: Differences, weight_P: np.ndarray) -> np.ndarray:
    """Minimises sum_p weight_p log(1 + exp(-score_p)) + 5 |w|^2 by L-BFGS: weights [C] of the n-grams.

    Args:
        rows: Differences of the pairs.
        weight_P: Weights of the pairs; 0 leaves a pair out.
    """
    used = weight_P[rows.row_Z] > 0
    part = replace(rows, row_Z=rows.row_Z[used], column_Z=rows.column_Z[used], value_Z=rows.value_Z[used])

    def loss(weight_C: np.ndarray) -> tuple[float, np.ndarray]:
        score_P = part.scores(weight_C)
        value = float(weight_P @ np.logaddexp(0, -score_P)) + _L2 / 2 * float(weight_C @ weight_C)
        residual_P = -weight_P / (1 + np.exp(np.clip(score_P, -500, 500)))
        return value, part.gradient(residual_P) + _L2 * weight_C

    return _minimise(loss, np.zeros(len(rows.id_C)), _TOLERANCE_PER_PAIR * float(weight_P.sum()))


def _minimise(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], at: np.ndarray, tolerance: float) -> np.ndarray:
    """L-BFGS with backtracking."""
    value, gradient = loss(at)
    tolerance = max(tolerance, _TOLERANCE * float(np.abs(gradient).max(initial=0.0)))
    history: list[tuple[np.ndarray, np.ndarray, float]] = []
    for _ in range(_MAX_STEPS):
        if float(np.abs(gradient).max(initial=0.0)) <= tolerance:
            break
        step = _direction(gradient, history)
        slope, rate = float(step @ gradient), 1.0
        while True:
            moved = at + rate * step
            new_value, new_gradient = loss(moved)
            if new_value <= value + 1e-4 * rate * slope or rate < 1e-6:
                break
            rate /= 2
        if new_value >= value:
            break  # no progress within rounding
        change, difference = moved - at, new_gradient - gradient
        curvature = float(change @ difference)
        if curvature > 1e-12:
            history = [*history[1 - _MEMORY :], (change, difference, 1 / curvature)]
        at, value, gradient = moved, new_value, new_gradient
    return at


def _direction(gradient: np.ndarray, history: list[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4); without history, a short gradient step."""
    step = -gradient
    if not history:
        return step / max(1.0, float(np.linalg.norm(gradient)))
    factors = []
    for change, difference, inverse in reversed(history):
        factor = inverse * float(change @ step)
        factors.append(factor)
        step = step - factor * difference
    change, difference, inverse = history[-1]
    step = step / (inverse * float(difference @ difference))
    for (change, difference, inverse), factor in zip(history, reversed(factors), strict=True):
        step = step + (factor - inverse * float(difference @ step)) * change
    return step
