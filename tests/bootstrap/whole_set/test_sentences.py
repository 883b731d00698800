"""Splitting answers into sentences."""

from __future__ import annotations

import pytest

from bpo.bootstrap.whole_set.sentences import sentence_spans


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog. A cat!  A cow?", ["A dog.", "A cat!", "A cow?"]),
        ("  One sentence without an end ", ["One sentence without an end"]),
        ('He says "Stop." Then he goes.', ['He says "Stop."', "Then he goes."]),
        ("Mr. Smith is 1.5 m tall. He sits.", ["Mr. Smith is 1.5 m tall.", "He sits."]),
        ("A sign, e.g. a stop sign. It is red.", ["A sign, e.g. a stop sign.", "It is red."]),
        ("Two things:\n1. A dog.\n2. A cat.", ["Two things:\n1. A dog.", "2. A cat."]),
        ("A title\n\nA dog.", ["A title", "A dog."]),
        ("一只狗。一只猫！", ["一只狗。", "一只猫！"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences
