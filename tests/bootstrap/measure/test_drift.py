"""Shares of words, objects, attributes and lengths in the kept annotations."""

from __future__ import annotations

import random

import numpy as np
import pytest

import bpo.bootstrap.measure.drift as drift_module
from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.measure.drift import Features
from tests.bootstrap.measure.worlds import caption


def captions(num: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(caption(draw) for _ in range(draw.randint(1, 3))) for _ in range(num)]


TEXTS = captions(3000)
FEATURES = Features(TEXTS, load_lexicon())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_random_subsets_are_not_reported(seed: int, share: float) -> None:
    is_kept = np.random.default_rng(seed).random(len(TEXTS)) < share
    drift = FEATURES.drift(is_kept)
    assert drift.shifts == () and drift.num_shifted == 0
    assert (drift.num_all, drift.num_kept) == (3000, is_kept.sum()) and drift.num_tried > 30


def test_deviations_are_in_standard_deviations_of_a_draw_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_module, "FALSE_ALARMS", FEATURES.drift(np.arange(len(TEXTS)) < 1500).num_tried)
    monkeypatch.setattr(drift_module, "_MIN_EFFECT", -1.0)
    monkeypatch.setattr(drift_module, "MOST_SHIFTED", 10**6)  # with the above, all that were tried are reported
    deviations = []
    for seed in range(20):
        is_kept = np.random.default_rng(seed).permutation(len(TEXTS)) < 1500
        deviations += [shift.z for shift in FEATURES.drift(is_kept).shifts]
    assert 0.9 < np.std(deviations) < 1.1 and abs(np.mean(deviations)) < 0.1


def test_rare_words_are_not_tried() -> None:
    draw = np.random.default_rng(0).random(len(TEXTS))
    assert FEATURES.drift(draw < 0.004).num_tried < FEATURES.drift(draw < 0.5).num_tried


def test_missing_records_of_one_object_are_found() -> None:
    draw = np.random.default_rng(0)
    is_kept = np.array([draw.random() < (0.3 if " dog" in text else 0.9) for text in TEXTS])
    drift = FEATURES.drift(is_kept)
    dogs = [(shift.what, shift.name) for shift in drift.shifts[:2]]
    assert sorted(dogs) == [("object", "dog"), ("word", "dog")]
    share = np.mean([" dog" in text for text in TEXTS])
    kept = np.mean([" dog" in text for text, is_there in zip(TEXTS, is_kept, strict=True) if is_there])
    assert drift.shifts[0].share_all == pytest.approx(share) and drift.shifts[0].share_kept == pytest.approx(kept)
    assert drift.shifts[0].z < -5


def test_longer_annotations_that_are_refused_are_found() -> None:
    is_kept = np.array([len(text.split()) < 12 or number % 4 == 0 for number, text in enumerate(TEXTS)])
    lengths = [shift for shift in FEATURES.drift(is_kept).shifts if shift.what == "length"]
    assert {shift.z > 0 for shift in lengths} == {True, False}
    assert all(shift.name.endswith(("words", "words or more")) for shift in lengths)


def test_attributes_are_found_and_small_shifts_are_not() -> None:
    draw = np.random.default_rng(1)
    texts = captions(6000, 3)
    is_red = np.array([" red " in text for text in texts])
    features = Features(texts, load_lexicon())
    strong = features.drift(~is_red | (draw.random(6000) < 0.5))
    assert ("attribute", "red") in {(shift.what, shift.name) for shift in strong.shifts}
    is_a_bit_less = features.drift(~is_red | (draw.random(6000) < 0.93))
    assert is_a_bit_less.num_shifted == 0


@pytest.mark.parametrize("is_kept", [np.ones(3000, dtype=bool), np.zeros(3000, dtype=bool)])
def test_all_or_nothing_kept_is_no_shift(is_kept: np.ndarray) -> None:
    drift = FEATURES.drift(is_kept)
    assert drift.shifts == () and drift.num_kept == is_kept.sum()


def test_no_annotation() -> None:
    assert Features([], load_lexicon()).drift(np.zeros(0, dtype=bool)).num_all == 0
