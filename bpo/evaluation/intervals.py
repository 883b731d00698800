"""Bootstrap intervals of metrics, and paired differences between two models on the same units.

Units are resampled with replacement (cluster bootstrap): answers about one image are not independent. Metrics are
functions of sums, so R resamples are a matrix product of their multiplicities [R, U] with the counts [U, C].

Shape letters: R resamples, U units, C counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpo.evaluation.benchmark import Question, Scores, Sums, ratio

Metrics = Callable[[Sums], dict[str, np.ndarray]]
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK_BYTES = 16 << 20  # of multiplicities at a time, and as much each of draws and copies
_ANSWERS, _WORDS = "answers", "answer_words"
LENGTH = "mean_answer_words"


@dataclass(frozen=True, slots=True)
class UnitCounts:
    """Counts by unit.

    Attributes:
        units: U names, sorted, so that two models with the same units are resampled alike.
        names: C names of counts.
        counts_UC: fp64.
    """

    units: tuple[str, ...]
    names: tuple[str, ...]
    counts_UC: np.ndarray

    def sums(self) -> Sums:
        """Sums over all units, of shape []."""
        return self._named(self.counts_UC.sum(0))

    def resampled_sums(self, num_resamples: int, seed: int) -> Sums:
        """Sums over resamples of the units, of shape [R]; those of equal R, U and seed draw the same units."""
        rng, num_units = np.random.default_rng(seed), len(self.units)
        chunk = max(1, _CHUNK_BYTES // (8 * num_units))
        sums_RC = []
        for start in range(0, num_resamples, chunk):
            rows = min(chunk, num_resamples - start)
            drawn_RU = rng.integers(num_units, size=(rows, num_units)) + num_units * np.arange(rows)[:, None]
            multiplicity_RU = np.bincount(drawn_RU.ravel(), minlength=rows * num_units).reshape(rows, num_units)
            sums_RC.append(multiplicity_RU.astype(np.float64) @ self.counts_UC)
        return self._named(np.concatenate(sums_RC))

    def _named(self, totals: np.ndarray) -> Sums:
        return Sums({name: totals[..., number] for number, name in enumerate(self.names)})

    def to_json(self) -> dict[str, Any]:
        return {"units": list(self.units), "names": list(self.names), "counts": self.counts_UC.tolist()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> UnitCounts:
        names = tuple(tree["names"])
        counts_UC = np.asarray(tree["counts"], dtype=np.float64).reshape(len(tree["units"]), len(names))
        return cls(tuple(tree["units"]), names, counts_UC)


def count_units(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> UnitCounts:
    """Counts by unit of `scores`, and the number and length in words of the answers."""
    lengths = [
        (question.resampled, {_ANSWERS: 1.0, _WORDS: float(len(answer.split()))})
        for question, answer in zip(questions, answers, strict=True)
    ]
    rows = [*scores.rows, *lengths]
    units = sorted({unit for unit, _ in rows})
    names = list(dict.fromkeys(name for _, counts in rows for name in counts))
    row_of, column_of = {unit: n for n, unit in enumerate(units)}, {name: n for n, name in enumerate(names)}
    counts_UC = np.zeros((len(units), len(names)))
    for unit, counts in rows:
        for name, value in counts.items():
            counts_UC[row_of[unit], column_of[name]] += value
    return UnitCounts(tuple(units), tuple(names), counts_UC)


def values_of(metrics: Metrics, sums: Sums) -> dict[str, np.ndarray]:
    """The benchmark's metrics and the mean length of the answers."""
    return metrics(sums) | {LENGTH: ratio(sums[_WORDS], sums[_ANSWERS])}


def metric_intervals(
    counts: UnitCounts, metrics: Metrics, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[float, float, float]]:
    """metric -> (value, low, high): percentile bootstrap interval at confidence `CONFIDENCE`."""
    resampled = values_of(metrics, counts.resampled_sums(num_resamples, seed))
    return {
        name: (float(value), *_percentiles(resampled[name]))
        for name, value in values_of(metrics, counts.sums()).items()
    }


def paired_differences(
    first: UnitCounts, second: UnitCounts, metrics: Metrics, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[float, float, float]]:
    """metric of both -> (second - first, low, high); both are evaluated on the same resamples of the units.

    Raises:
        ValueError: The units differ.
    """
    if first.units != second.units:
        differing = sorted({*first.units} ^ {*second.units})
        raise ValueError(f"{len(differing)} units are in one result only, such as {differing[0]!r}")
    whole = [values_of(metrics, counts.sums()) for counts in (first, second)]
    resampled = [values_of(metrics, counts.resampled_sums(num_resamples, seed)) for counts in (first, second)]
    return {
        name: (float(whole[1][name] - whole[0][name]), *_percentiles(resampled[1][name] - resampled[0][name]))
        for name in whole[0]
        if name in whole[1]  # metrics may depend on the answers, such as rates by the categories of a verifier
    }


def _percentiles(values_R: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)
