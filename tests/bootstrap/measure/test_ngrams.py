"""Hashed n-grams."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from bpo.bootstrap.measure.ngrams import ngram_ids, ngrams, tokens_of


def test_tokens_are_words_numbers_marks_and_single_cjk_characters() -> None:
    assert tokens_of("A dog's 2.5 kg-bag, _x!") == ["a", "dog's", "2.5", "kg-bag", ",", "_", "x", "!"]
    assert tokens_of("狗在 left") == ["狗", "在", "left"]
    assert tokens_of("ÉTÉ été") == ["été", "été"]


def test_ngrams_are_tokens_then_neighbours_with_marks() -> None:
    assert ngrams("A dog.") == ["a", "dog", ".", "<s> a", "a dog", "dog .", ". </s>"]
    assert ngrams("") == ["<s> </s>"]
    assert len(ngram_ids("A dog.")) == 7 and len(ngram_ids("")) == 1


def test_equal_ngrams_have_equal_ids_and_order_matters() -> None:
    text = "a cat and a dog and a cat"
    ids, names = ngram_ids(text, bits=32), ngrams(text)
    assert len({(i, n) for i, n in zip(ids.tolist(), names, strict=True)}) == len(set(names)) == len(set(ids.tolist()))
    assert set(ngram_ids("a b", 32).tolist()) & set(ngram_ids("b a", 32).tolist()) == set(ngram_ids("a", 32)[:1]) | set(
        ngram_ids("b", 32)[:1]
    )


def test_ids_use_the_whole_range_evenly() -> None:
    ids = np.concatenate([ngram_ids(f"word{i} other{i}", bits=8) for i in range(4000)])
    assert ids.min() >= 0 and ids.max() < 256
    counts = np.bincount(ids, minlength=256)
    assert counts.min() > 0


def test_ids_do_not_depend_on_the_process() -> None:
    code = "from bpo.bootstrap.measure.ngrams import ngram_ids; print(ngram_ids('A red bus.').tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(ngram_ids("A red bus.").tolist())


@pytest.mark.parametrize("bits", [0, 33])
def test_impossible_number_of_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        ngram_ids("a", bits)
