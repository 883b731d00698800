"""Which candidates are paired, and how lengths are balanced."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo.ranking.select.rules import all_pairs, balance_lengths, best_worst, distinct, top_bottom

TEXTS = ["a cat", "a dog", "A dog.", "two cats", "no", "a  cat", "dog a"]


def test_best_and_worst() -> None:
    assert best_worst([1.0, 3.0, 2.0], ["x", "y", "z"]) == (1, 0)
    assert best_worst([1.0, 1.0, 1.0], ["x", "y", "z"]) is None
    assert best_worst([1.0], ["x"]) is None and best_worst([], []) is None
    assert best_worst([1.0, 1.5], ["x", "y"], min_margin=0.5) == (1, 0)
    assert best_worst([1.0, 1.4], ["x", "y"], min_margin=0.5) is None


def test_equal_words_are_one_candidate_with_the_highest_score() -> None:
    assert best_worst([2.0, 1.0], ["A dog.", "a  dog"]) is None
    assert all_pairs([2.0, 1.0, 0.0], ["A dog.", "a dog", "a cat"]) == [(0, 2)]
    assert sorted(all_pairs([1.0, 0.0], ["a left of b", "b left of a"])) == [(0, 1)]  # other words in another order
    assert distinct([0.0, 1.0, 0.0], ["no", "No", "yes"]) == [1, 2]


def test_top_against_bottom() -> None:
    texts = list("abcde")
    assert sorted(top_bottom([5.0, 4.0, 3.0, 2.0, 1.0], texts, 2)) == [(0, 3), (0, 4), (1, 3), (1, 4)]
    assert top_bottom([5.0, 4.0, 3.0], texts[:3], 2) == [(0, 2)]  # the middle one would be on both sides
    pairs = top_bottom([1.0, 1.0, 1.0, 0.0], texts[:4], 2)
    assert len(pairs) == 2 and {j for _, j in pairs} == {3}  # equal scores do not pair
    assert top_bottom([5.0, 4.0, 3.0, 2.0], texts[:4], 2, min_margin=3) == [(0, 3)]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(TEXTS)), max_size=7), st.randoms(), st.sampled_from([0, 2])
)
def test_the_order_of_the_candidates_does_not_matter(
    candidates: list[tuple[int, str]], shuffle: random.Random, margin: int
) -> None:
    shuffled = candidates.copy()
    shuffle.shuffle(shuffled)

    def texts_of(found: list[tuple[int, str]]) -> list[list[tuple[tuple[int, str], tuple[int, str]]]]:
        scores, texts = [score for score, _ in found], [text for _, text in found]
        best = best_worst(scores, texts, margin)
        every = [[best] if best else [], all_pairs(scores, texts, margin), top_bottom(scores, texts, 2, margin)]
        assert all(scores[i] - scores[j] >= max(margin, 1) for pairs in every for i, j in pairs)
        return [[(found[i], found[j]) for i, j in pairs] for pairs in every]

    assert texts_of(candidates) == texts_of(shuffled)


def test_ties_are_not_broken_alphabetically() -> None:
    """Else the first letter would tell preferred from rejected answers."""
    texts = [f"{letter} {n}" for n in range(40) for letter in "az"]
    firsts = [texts[2 * n + distinct([0, 0], texts[2 * n : 2 * n + 2])[0]][0] for n in range(40)]
    assert 10 < firsts.count("a") < 30


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_lengths_have_equal_means_after_balancing(longer: str) -> None:
    rng = np.random.default_rng(0)
    short, long = rng.integers(1, 100, 500), rng.integers(1, 130, 500)
    chosen, rejected = (long, short) if longer == "chosen" else (short, long)
    kept = balance_lengths(chosen, rejected, rng.integers(0, 2**60, 500))
    excess = (long - short) / long
    assert excess[~kept].min() >= excess[kept].max() and 0 < (~kept).sum() < 200
    assert abs(int(long[kept].sum()) - int(short[kept].sum())) <= max(long - short) / 2


def test_ties_of_lengths_are_broken_by_rank() -> None:
    """All pairs have the same excess: a threshold alone would drop all or none."""
    chosen, rejected = [4] * 6 + [8] * 3, [8] * 6 + [4] * 3
    kept = balance_lengths(chosen, rejected, [5, 3, 4, 0, 2, 1, 0, 0, 0])
    assert kept.tolist() == [True, True, True, False, False, False, True, True, True]
    order = [2, 0, 1, 5, 4, 3, 8, 6, 7]
    again = balance_lengths(*(np.take(v, order) for v in (chosen, rejected, [5, 3, 4, 0, 2, 1, 0, 0, 0])))
    assert again.tolist() == kept[order].tolist()
    assert balance_lengths([3, 4], [4, 3], [0, 0]).all() and balance_lengths([], [], []).shape == (0,)
