"""Rules that pair scored candidates, and the balance of lengths: pure functions.

A pair is (index of the preferred, index of the rejected candidate). The order of the candidates does not matter: those
with the same words count once, with the highest of their scores, and a hash of the text breaks ties for a place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from bpo.bootstrap.changes import words_of
from bpo.bootstrap.measure.pairs import sample_rank

Pair = tuple[int, int]


def distinct(scores: Sequence[float], texts: Sequence[str]) -> list[int]:
    """Indices of the candidates with different words (case and punctuation aside), best first."""
    first: dict[tuple[str, ...], int] = {}
    # Not in alphabetical order: the first words would tell preferred from rejected answers.
    for k in sorted(range(len(scores)), key=lambda k: (-scores[k], sample_rank(0, texts[k]), texts[k])):
        first.setdefault(tuple(words_of(texts[k])), k)
    return list(first.values())


def best_worst(scores: Sequence[float], texts: Sequence[str], min_margin: float = 0.0) -> Pair | None:
    """The best and the worst candidate (PDS-DPO, arXiv 2412.17417); None if all tie or these two are too close."""
    return next(iter(top_bottom(scores, texts, 1, min_margin)), None)


def all_pairs(scores: Sequence[float], texts: Sequence[str], min_margin: float = 0.0) -> list[Pair]:
    """Every two candidates whose scores differ, and by at least `min_margin`."""
    return _apart(itertools.combinations(distinct(scores, texts), 2), scores, min_margin)


def top_bottom(scores: Sequence[float], texts: Sequence[str], k: int, min_margin: float = 0.0) -> list[Pair]:
    """Each of the `k` best with each of the `k` worst; fewer than 2k candidates are divided into halves."""
    order = distinct(scores, texts)
    k = min(k, len(order) // 2)
    return _apart(itertools.product(order[:k], order[len(order) - k :]), scores, min_margin)


def _apart(pairs: Iterable[Pair], scores: Sequence[float], min_margin: float) -> list[Pair]:
    return [(i, j) for i, j in pairs if scores[i] > scores[j] and scores[i] - scores[j] >= min_margin]


def balance_lengths(chosen: ArrayLike, rejected: ArrayLike, ranks: ArrayLike) -> np.ndarray:
    """Which pairs to keep, [P] bool, so that preferred and rejected answers have the same mean length.

    RLAIF-V (arXiv 2405.17220) drops pairs with (len_l - len_w) / len_l > r, with r such that the means are equal. If
    preferred answers are longer on average, those with (len_w - len_l) / len_w > r are dropped: length would be
    preferred. Lower `ranks` [P] break ties, so that the sums differ by at most half of the excess of one pair.
    """
    shorter, longer = np.asarray(chosen, np.int64), np.asarray(rejected, np.int64)
    if longer.sum() < shorter.sum():
        shorter, longer = longer, shorter
    excess = longer - shorter
    order = np.lexsort((np.asarray(ranks, np.uint64), -excess / longer))
    # Difference of the sums without the first 0, 1, 2 ... pairs; it falls as long as these have an excess.
    left = excess.sum() - np.concatenate(([0], excess[order].cumsum()))
    kept = np.ones(len(excess), dtype=bool)
    kept[order[: np.abs(left[: np.count_nonzero(excess > 0) + 1]).argmin()]] = False
    return kept
