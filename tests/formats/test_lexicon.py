"""Mentions match an exhaustive search over all phrases."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bpo.formats.lexicon import ObjectLexicon, build_lexicon, singular_forms

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
    """Finds the longest phrase at each position by exhaustive search."""
    spans = [(m.group().lower(), m.start(), m.end()) for m in re.finditer(r"[^\W_]+", text)]
    words = [word for word, _, _ in spans]
    found, at = [], 0
    while at < len(words):
        length, name = 1, None
        for size in range(len(words) - at, 0, -1):
            *head, last = words[at : at + size]
            forms = [(*head, form) for form in (last, *singular_forms(last))]
            if known := [form for form in forms if form in lexicon.canonical_of_phrase]:
                length, name = size, lexicon.canonical_of_phrase[known[0]]
                break
        lone_seat = words[at : at + length] in (["seat"], ["seats"]) and {"toilet", "toilets"} & set(words)
        if name is not None and not lone_seat:
            found.append((name, spans[at][1], spans[at + length - 1][2]))
        at += length
    return found


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([" ", ", ", " - "]))
def test_mentions_are_those_of_a_search_through_all_phrases(words: list[str], between: str) -> None:
    text = between.join(words)
    assert [(m.object, m.start, m.end) for m in LEXICON.mentions(text)] == by_search(LEXICON, text)


def test_a_plural_that_starts_a_longer_phrase_is_still_a_plural() -> None:
    assert [m.object for m in LEXICON.mentions("Dogs bark at the dogs house.")] == ["dog", "dogs house"]
