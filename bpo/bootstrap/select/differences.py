"""Differences of n-gram counts between the two answers of a pair, and the imbalance of a set of pairs.

If the differences sum to zero over a set, the gradient of logistic regression on them is zero at zero: no linear model
of the text tells the preferred answers of this set from the rejected ones.

Shape letters: F features (hashed n-grams), R rows (pairs), E nonzero entries of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bpo.bootstrap.measure.ngrams import ngram_ids

BITS = 18
NUM_FEATURES = 1 << BITS
# Pairs of imaginary balanced data per feature: an n-gram of a few pairs counts less than its share of the pairs.
SMOOTHING = 10.0
TOLERATED_DEVIATIONS = 2.0


def differences(preferred: str, rejected: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """n-gram counts of each rejected answer minus those of the preferred one: (features, values) of the nonzero."""
    base = ngram_ids(preferred, BITS)
    rows = []
    for text in rejected:
        own = ngram_ids(text, BITS)
        features, entry = np.unique(np.concatenate([own, base]), return_inverse=True)
        counts = np.bincount(entry[: len(own)], minlength=len(features)).astype(np.float32)
        counts -= np.bincount(entry[len(own) :], minlength=len(features))
        rows.append((features[counts != 0].astype(np.int32), counts[counts != 0]))
    return rows


@dataclass(frozen=True, slots=True)
class Rows:
    """A sparse matrix [R, F]: row r has the values `value_E[start_R1[r]:start_R1[r + 1]]` at the features there."""

    feature_E: np.ndarray
    value_E: np.ndarray
    start_R1: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rows:
        starts = np.concatenate([[0], np.cumsum([len(features) for features, _ in rows], dtype=np.int64)])
        empty = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
        features, values = zip(empty, *rows, strict=True)
        return cls(np.concatenate(features), np.concatenate(values), starts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.start_R1) - 1

    def dot(self, vector_F: np.ndarray) -> np.ndarray:
        """Product of each row with a vector: [F] -> [R] float64."""
        return self.sums(self.value_E * vector_F[self.feature_E])

    def sums(self, entry_E: np.ndarray) -> np.ndarray:
        """Sum of a quantity of the entries over each row: [E] -> [R] float64."""
        running = np.concatenate([[0.0], np.cumsum(entry_E, dtype=np.float64)])
        return running[self.start_R1[1:]] - running[self.start_R1[:-1]]

    def total(self, weight_R: np.ndarray) -> np.ndarray:
        """Weighted sum of the rows: [R] -> [F] float64."""
        entry_E = self.value_E * np.repeat(weight_R, np.diff(self.start_R1))
        return np.bincount(self.feature_E, weights=entry_E, minlength=NUM_FEATURES)

    def squares(self, weight_R: np.ndarray) -> np.ndarray:
        """Weighted sum of the squared entries of the rows: [R] -> [F] float64."""
        entry_E = self.value_E**2 * np.repeat(weight_R, np.diff(self.start_R1))
        return np.bincount(self.feature_E, weights=entry_E, minlength=NUM_FEATURES)


def tolerance(variance: np.ndarray) -> np.ndarray:
    """How far from 0 the sums are left alone: two standard deviations of their distribution by chance.

    Made more even than by chance, words that are put in in one part of the set would be taken out in the rest, and the
    freedom to choose would be spent on noise.
    """
    return TOLERATED_DEVIATIONS * np.sqrt(variance)


def beyond(residual: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The part of sums that is beyond `tolerance`."""
    part: np.ndarray = residual - np.clip(residual, -bound, bound)
    return part


class Imbalance:
    """Running sums over the pairs of one source: of their differences, and of the squares of these.

    A feature is scaled by the variance that its sum would have if each pair were turned around at random, so that
    frequent and rare n-grams count alike.

    Attributes:
        residual_F: Sum of the differences.
        variance_F: Sum of their squares.
    """

    def __init__(self) -> None:
        self.residual_F = np.zeros(NUM_FEATURES)
        self.variance_F = np.zeros(NUM_FEATURES)

    def add(self, rows: Rows, weight_R: np.ndarray, square_R: np.ndarray) -> None:
        """Adds pairs; the squares of their differences count `square_R` times."""
        self.residual_F += rows.total(weight_R)
        self.variance_F += rows.squares(square_R)

    @property
    def scale_F(self) -> np.ndarray:
        return 1.0 / (self.variance_F + SMOOTHING)

    @property
    def value(self) -> float:
        """Mean squared sum over the features, scaled: about 1 if rejected and preferred answers are drawn alike."""
        scale_F = self.scale_F
        by_chance = float(self.variance_F @ scale_F)
        return float(self.residual_F**2 @ scale_F) / by_chance if by_chance else 0.0
