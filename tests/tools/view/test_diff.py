"""Diffs of negatives."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpo.bootstrap.changes import load_lexicon
from bpo.tools.view.diff import diff_segments, plain_segments

OBJECTS = load_lexicon().objects


def joined(segments: list[list[str]], ops: str) -> str:
    return "".join(segment[1] for segment in segments if segment[0] in ops)


def test_added_dropped_and_changed_are_told_apart_and_objects_named() -> None:
    segments = diff_segments("A big dog sits on the old sofa.", "A big cat sits on the sofa here.", OBJECTS)
    assert [s[:2] for s in segments if s[0] in "+-x~"] == [["x", "dog"], ["~", "cat"], ["-", "old"], ["+", "here"]]
    assert ["~", "cat", "cat"] in segments
    assert plain_segments("Two dogs.", OBJECTS) == [["=", "Two "], ["=", "dogs", "dog"], ["=", "."]]


texts = st.text(alphabet="ab .\n<&'-日é\u0301\u200d🇫🇷👍🏽ห้", max_size=40)


@given(texts, texts)
def test_a_diff_holds_both_texts(annotation: str, response: str) -> None:
    segments = diff_segments(annotation, response, OBJECTS)
    assert joined(segments, "=+~") == response
    dropped = "".join("".join(s[1].split()) for s in segments if s[0] in "=-x")
    assert dropped.casefold() == "".join(annotation.split()).casefold()


@pytest.mark.parametrize(
    ("annotation", "response", "changed"),
    [
        ("一只狗在草地上", "一只猫在草地上", ["狗", "猫"]),  # written without spaces: each character is a word
        ("犬がいます", "猫がいます", ["犬", "猫"]),
        ("यह एक बिल्ली है", "यह एक कुत्ता है", ["बिल्ली", "कुत्ता"]),  # vowel signs belong to their letter
        ("ein Fluß", "ein Fluss", []),
        ("👨‍👩‍👧 here", "👨‍👩‍👦 here", ["👨‍👩‍👧", "👨‍👩‍👦"]),
        ("🇫🇷 flag", "🇩🇪 flag", ["🇫🇷", "🇩🇪"]),
        ("cafe\u0301 open", "cafe\u0301s open", ["cafe\u0301", "cafe\u0301s"]),
        ("می‌خواهم سگ", "می‌خواهم گربه", ["سگ", "گربه"]),
    ],
)
def test_words_of_any_script_are_compared_whole(annotation: str, response: str, changed: list[str]) -> None:
    assert [s[1] for s in diff_segments(annotation, response, OBJECTS) if s[0] != "=" and s[1].strip()] == changed


def test_a_mention_is_whole_where_it_ends_with_a_change() -> None:
    segments = diff_segments("a traffic jam", "a traffic light", OBJECTS)
    assert [s for s in segments if len(s) == 3] == [["=", "traffic ", "traffic light"], ["~", "light", "traffic light"]]


@pytest.mark.parametrize("words", [["a"], "a dog and a cat sit on the red sofa near the old table".split()])
def test_long_texts_take_a_bounded_time(words: list[str]) -> None:
    annotation = " ".join(words[n % len(words)] for n in range(5000))
    response = " ".join(words[(n * 7 + n // 11) % len(words)] for n in range(4990))
    started = time.process_time()
    assert joined(diff_segments(annotation, response, OBJECTS), "=+~") == response
    assert time.process_time() - started < 2
