"""The text-only discriminator on sets with a known answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import bpo.bootstrap.measure.discriminator as discriminator
from bpo.bootstrap.measure.discriminator import accuracy_of, by_kind, discriminate
from bpo.bootstrap.measure.folds import Folds
from bpo.bootstrap.measure.pairs import TextPair
from tests.bootstrap.measure.worlds import exchanged, independent, swapped, telling


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("world", [independent, swapped, exchanged])
def test_balanced_texts_give_chance(world: object, seed: int) -> None:
    result = discriminate(world(1200, seed))  # type: ignore[operator]
    assert abs(result.accuracy - 0.5) < 0.06, (result.accuracy, result.evenness)
    assert 0.012 < result.standard_error < 0.016
    assert result.share_above_zero == pytest.approx(1 - result.accuracy, abs=0.02)
    assert result.preferred_ngrams == result.rejected_ngrams == ()


@pytest.mark.parametrize("world", [swapped, exchanged])
def test_folds_by_record_would_call_balanced_texts_reversed(world: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak that the folds prevent: what is held out was trained on with the opposite label."""

    def by_record(pairs: list[TextPair], num_folds: int, exchanges: bool) -> Folds:
        fold_P = np.arange(len(pairs)) % num_folds
        return Folds(fold_P, fold_P[:, None] != np.arange(num_folds)[None], False)

    def accuracy() -> float:
        return float(np.mean([discriminate(world(240, seed)).accuracy for seed in range(6)]))  # type: ignore[operator]

    linked = accuracy()
    monkeypatch.setattr(discriminator, "make_folds", by_record)
    assert abs(linked - 0.5) < 0.04 and accuracy() < linked - 0.04


def test_evenness_tells_chance_from_balance() -> None:
    assert discriminate(swapped(400)).evenness == 0
    assert 0.6 < discriminate(independent(2000)).evenness < 1.6
    assert discriminate(telling(400, 1.0)).evenness > 10


def test_one_telling_word_is_enough() -> None:
    result = discriminate(telling(400, 1.0))
    assert result.accuracy == 1 and result.share_above_zero == 0 and result.median_margin > 1
    assert "perhaps" in result.rejected_ngrams[0].ngram
    assert (result.rejected_ngrams[0].preferred, result.rejected_ngrams[0].rejected) == (0, 400)
    assert result.length_accuracy == result.rejected_longer == 1 and result.rejected_shorter == 0


def test_a_word_in_half_of_the_pairs_gives_three_quarters() -> None:
    result = discriminate(telling(2000, 0.5))
    assert abs(result.accuracy - 0.75) < 3 * 0.01
    assert result.is_beyond_chance and not discriminate(independent(2000)).is_beyond_chance
    assert 0.009 < result.standard_error < 0.011


def test_telling_ngrams_do_not_repeat_each_other() -> None:
    names = [telling.ngram for telling in discriminate(telling(400, 1.0)).rejected_ngrams]
    assert names == ["perhaps </s>", ". perhaps"]  # and not "perhaps" alone


def test_a_text_memorised_in_one_fold_does_not_help_another() -> None:
    """The same 60 random pairs of texts in 10 records each: only memory could tell."""
    pairs = [replace(pair, record_id=f"{pair.record_id}-{copy}") for pair in independent(60, 5) for copy in range(10)]
    assert abs(discriminate(pairs).accuracy - 0.5) < 0.2


def test_weights_balance_what_the_texts_do_not() -> None:
    """A word rejected in 3 of 4 pairs, in which those that prefer it weigh 3 times as much."""
    pairs = []
    for i, pair in enumerate(independent(2000)):
        if i % 4:
            pairs.append(replace(pair, rejected=f"{pair.rejected} Perhaps"))
        else:
            pairs.append(replace(pair, preferred=f"{pair.preferred} Perhaps", weight=3.0))
    unweighted = discriminate([replace(pair, weight=1.0) for pair in pairs])
    weighted = discriminate(pairs)
    assert abs(unweighted.accuracy - 0.75) < 0.04 and weighted.accuracy < 0.56


def test_pairs_of_one_record_are_counted_together() -> None:
    pairs = [TextPair(f"r{i // 10}", "a", "b") for i in range(100)]
    margin_P = np.array([1.0 if (i // 10) % 2 else -1.0 for i in range(100)])
    assert accuracy_of(pairs, margin_P) == (0.5, pytest.approx(0.5 / np.sqrt(10)))
    single = [TextPair(f"r{i}", "a", "b") for i in range(100)]
    assert accuracy_of(single, margin_P) == (0.5, pytest.approx(0.05))
    assert accuracy_of(single, np.zeros(100))[0] == 0.5


def test_kinds_of_change_are_counted_apart() -> None:
    pairs = [TextPair(f"r{i}", "a", "b") for i in range(4)]
    kinds = {0: frozenset({"object"}), 1: frozenset({"object", "count"}), 2: frozenset[str]()}
    found = by_kind(pairs, np.array([1.0, -1.0, 0.0, 1.0]), kinds)
    assert {kind: (f["pairs"], f["accuracy"], f["share_above_zero"]) for kind, f in found.items()} == {
        "object": (2, 0.5, 0.5),
        "count": (1, 0.0, 1.0),
        "style": (1, 0.5, 0.0),
    }


def test_fewer_pairs_than_folds_are_refused() -> None:
    with pytest.raises(ValueError, match="4 pairs cannot be split into 5 folds"):
        discriminate(independent(4))
