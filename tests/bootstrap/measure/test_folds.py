"""Folds in which linked pairs are held out together."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from bpo.bootstrap.measure.folds import MAX_LINKED_RECORDS, exchange_cycles, make_folds
from bpo.bootstrap.measure.pairs import TextPair
from tests.bootstrap.measure.worlds import exchanged, independent, swapped


def texts_of(pairs: list[TextPair], chosen: np.ndarray) -> set[str]:
    return {
        text
        for pair, is_chosen in zip(pairs, chosen, strict=True)
        if is_chosen
        for text in (pair.preferred, pair.rejected)
    }


def test_folds_are_about_equal_and_hold_out_each_pair_once() -> None:
    folds = make_folds(independent(103), 5)
    assert Counter(np.bincount(folds.fold_P).tolist()) <= Counter({20: 2, 21: 3, 22: 3})
    assert not folds.trains_PF[np.arange(103), folds.fold_P].any()


def test_pairs_of_a_record_a_donor_and_a_text_share_a_fold() -> None:
    draw = random.Random(0)
    pairs = []
    for i in range(40):
        pairs += [TextPair(f"r{i}", f"own {i}", f"first {i}"), TextPair(f"r{i}", f"own {i}", f"second {i}")]
        pairs += [TextPair(f"s{i}", f"of s{i}", f"a sentence {i}", donor=f"r{i}")]
        pairs += [TextPair(f"t{i}", f"of t{i}", f"first {i}")]
    draw.shuffle(pairs)
    folds = make_folds(pairs, 5)
    fold_of = {}
    for pair, fold in zip(pairs, folds.fold_P.tolist(), strict=True):
        assert fold_of.setdefault(pair.record_id[1:], fold) == fold
    assert not folds.is_cut and folds.trains_PF.sum(axis=1).tolist() == [4] * len(pairs)


def test_a_common_answer_is_no_link() -> None:
    pairs = [TextPair(f"r{i}", "Yes.", f"No, it is {i}.") for i in range(MAX_LINKED_RECORDS + 1)]
    assert not make_folds(pairs, 3).is_cut
    assert make_folds(pairs[:-1], 3).is_cut


def test_no_text_of_a_held_out_pair_is_trained_on_even_if_all_pairs_are_linked() -> None:
    pairs = swapped(200)
    folds = make_folds(pairs, 5)
    assert folds.is_cut
    for fold in range(5):
        held_out = folds.fold_P == fold
        assert held_out.sum() == 40
        assert not texts_of(pairs, held_out) & texts_of(pairs, folds.trains_PF[:, fold])
        assert folds.trains_PF[:, fold].sum() > 150  # a cycle is cut in few places


def test_exchanged_words_come_in_cycles() -> None:
    pairs = exchanged(500)
    cycles = exchange_cycles(pairs)
    assert sorted(number for cycle in cycles for number in cycle) == list(range(len(pairs)))
    for cycle in cycles:
        gone = Counter(pairs[number].preferred.split()[2] for number in cycle)
        assert gone == Counter(pairs[number].rejected.split()[2] for number in cycle)
    assert max(map(len, cycles)) <= 20  # no object twice


def test_pairs_that_exchange_nothing_back_are_in_no_cycle() -> None:
    pairs = [
        TextPair("1", "A dog.", "A cat."),
        TextPair("2", "The cat.", "The bus."),
        TextPair("3", "A tree.", "A dog."),
    ]
    assert exchange_cycles(pairs) == []
    pairs += [
        TextPair("4", "An airplane.", "A tree."),
        TextPair("5", "A bus.", "An airplane."),
        TextPair("6", "Hi.", "Hi."),
    ]
    assert sorted(map(sorted, exchange_cycles(pairs))) == [[0, 1, 2, 3, 4]]


def test_folds_do_not_depend_on_hash_seeds() -> None:
    code = (
        "from bpo.bootstrap.measure.folds import make_folds\n"
        "from tests.bootstrap.measure.worlds import exchanged, swapped\n"
        "print([make_folds(pairs, 5, exchanges=True).fold_P.tolist() for pairs in (swapped(60), exchanged(60))])"
    )
    root = Path(__file__).resolve().parents[3]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
