"""Mentions of objects, on cases by hand and against an exhaustive search over all phrases."""

from __future__ import annotations

import itertools
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpo.formats.lexicon import ObjectLexicon, build_lexicon, singular_forms

COCO_LINES = [
    "person, girl, boy, man, woman, child, baby, passenger",
    "bus",
    "train",
    "airplane, jet, plane",
    "cat, kitten",
    "dog, puppy",
    "bear",
    "elephant",
    "tie",
    "wine glass",
    "knife",
    "bowl",
    "hot dog",
    "chair, seat",
    "couch, sofa",
    "potted plant, houseplant, plant",
    "dining table, table, desk",
    "toilet",
    "cell phone, mobile phone, phone",
    "traffic light, street light, stop light",
    "scissors",
    "skis, ski",
    "mouse",
    "bench",
    "bus stop shelter, shelter",
]


def lexicon_of(*lines: str) -> ObjectLexicon:
    return build_lexicon([name.strip() for name in line.split(",")] for line in lines)


COCO = lexicon_of(*COCO_LINES)


def named(text: str, lexicon: ObjectLexicon = COCO) -> list[str]:
    return [mention.object for mention in lexicon.mentions(text)]


@pytest.mark.parametrize(
    "text, objects",
    [
        ("A man pets a kitten.", ["person", "cat"]),
        ("A dog and another dog", ["dog", "dog"]),
        ("The DOG's bowl", ["dog", "bowl"]),
        ("two dogs, three buses and four benches", ["dog", "bus", "bench"]),
        ("women and children with knives", ["person", "person", "knife"]),
        ("people feed mice on sofas", ["person", "mouse", "couch"]),
        ("scissors and skis", ["scissors", "skis"]),
        ("a hot dog, hot dogs, a hot-dog and a dog", ["hot dog", "hot dog", "dog"]),
        ("wine glasses on a dining table beside a table", ["wine glass", "dining table", "dining table"]),
        ("a bus stop shelter beside a bus", ["bus stop shelter", "bus"]),
        ("a baby elephant and an adult bear", ["elephant", "bear"]),
        ("a baby and an elephant", ["person", "elephant"]),
        ("a baby animal", []),
        ("a baby zebra", []),
        ("a passenger train and a passenger jet", ["train", "airplane"]),
        ("a passenger in a train", ["person", "train"]),
        ("train tracks without a train", ["train"]),
        ("a bow tie", ["tie"]),
        ("a white toilet seat", ["toilet"]),
        ("a toilet with its seat up", ["toilet"]),
        ("an empty seat", ["chair"]),
        ("a category of doggerel on a plantation", []),
        ("", []),
    ],
)
def test_mentions(text: str, objects: list[str]) -> None:
    assert named(text) == objects


def test_mentions_say_where_they_stand() -> None:
    text = "Two  Mobile\nphones, a cat's bed."
    spans = [(mention.object, text[mention.start : mention.end]) for mention in COCO.mentions(text)]
    assert spans == [("cell phone", "Mobile\nphones"), ("cat", "cat")]


def test_the_two_word_rules_bend_to_the_file() -> None:
    assert named("a train track", lexicon_of("train", "train track, rail")) == ["train track"]
    assert named("a baby bear", lexicon_of("rock")) == []


def test_a_name_claimed_twice_goes_to_the_later_object(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lexicon = lexicon_of("tv, monitor", "laptop, monitor")
    assert named("a monitor", lexicon) == ["laptop"]
    assert "monitor" in caplog.text


@pytest.mark.parametrize("lines", [[], ["dog, "], ["!!"]])
def test_useless_synonyms_are_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError, match="no object|is empty"):
        lexicon_of(*lines)


def test_singular_forms_are_only_offered() -> None:
    assert singular_forms("glass") == ()
    assert "tie" in singular_forms("ties") and "berry" in singular_forms("berries")
    assert "leaf" in singular_forms("leaves") and "box" in singular_forms("boxes")


LEXICON = build_lexicon(
    [
        ["dog", "puppy"],
        ["dogs house", "kennel"],
        ["toilet"],
        ["chair", "seat"],
        ["hot dog stand"],
        ["person", "man", "policeman"],
        ["bear"],
        ["knife"],
        ["train"],
    ]
)
WORDS = sorted({word for phrase in LEXICON.canonical_of_phrase for word in phrase}) + [
    "dogs", "puppies", "men", "seats", "toilets", "knives", "stands", "baby", "track", "a", "houses", "hot", "glass"
]  # fmt: skip


def by_search(lexicon: ObjectLexicon, text: str) -> list[tuple[str, int, int]]:
    """Finds the longest phrase at each position by exhaustive search; text of plain words, commas and dashes."""
    tokens = [(m.group().lower(), m.start(), m.end()) for m in re.finditer(r"\w+|[,-]", text)]
    words = [word for word, _, _ in tokens]
    toilet = {"toilet", "toilets"} & set(words)
    found, at = [], 0
    while at < len(words):
        length, name = 1, None
        for size in range(len(words) - at, 0, -1):
            forms = itertools.product(*((word, *singular_forms(word)) for word in words[at : at + size]))
            known = [form for form in forms if form in lexicon.canonical_of_phrase]
            if known:
                length, name = size, lexicon.canonical_of_phrase[known[0]]
                if known[0] == ("seat",) and toilet:
                    name = None
                break
        if name is not None:
            found.append((name, tokens[at][1], tokens[at + length - 1][2]))
        at += length
    return found


@given(st.lists(st.sampled_from(WORDS), max_size=9), st.sampled_from([" ", ", ", " - "]))
def test_mentions_are_those_of_a_search_through_all_phrases(words: list[str], between: str) -> None:
    text = between.join(words)
    assert [(m.object, m.start, m.end) for m in LEXICON.mentions(text)] == by_search(LEXICON, text)


def test_a_plural_that_starts_a_longer_phrase_is_still_a_plural() -> None:
    assert [m.object for m in LEXICON.mentions("Dogs bark at the dogs house.")] == ["dog", "dogs house"]
