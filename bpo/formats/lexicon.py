"""Finds the objects that a text mentions: synonyms, plurals and CHAIR's double-word rules (arXiv 1809.02156).

A synonyms file has one object per line, its canonical name first: `person, man, woman, child`.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

logger = logging.getLogger(__name__)

_WORD_RE = re.compile(r"[^\W_]+")
_MAX_KNOWN_WORDS = 1 << 14

# CHAIR's rules for two-word phrases in which a single word names another object ("baby" a person, "seat" a chair).
_ANIMALS = "animal bear bird cat cow cub dog elephant giraffe horse sheep zebra".split()
_AGES = ("baby", "adult")
_VEHICLES = ("jet", "train")
_TWO_WORD_RULES = {
    **{(age, animal): animal for age in _AGES for animal in _ANIMALS},
    **{("passenger", vehicle): vehicle for vehicle in _VEHICLES},
    ("bow", "tie"): "tie",
    ("toilet", "seat"): "toilet",
    ("home", "plate"): None,
    ("train", "track"): None,
}

_IRREGULAR_PLURALS = {
    "calves": "calf",
    "children": "child",
    "feet": "foot",
    "geese": "goose",
    "men": "man",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "policemen": "policeman",
    "snowmen": "snowman",
    "teeth": "tooth",
    "women": "woman",
}


@dataclass(frozen=True, slots=True)
class Mention:
    """A mention of an object: its canonical name and its span `text[start:end]`."""

    object: str
    start: int
    end: int


@dataclass(frozen=True)
class ObjectLexicon:
    """Maps phrases to the objects they name.

    Attributes:
        canonical_of_phrase: Words of a phrase -> canonical name, or None for a phrase that names no object.
        objects: Canonical names, in file order.
    """

    canonical_of_phrase: Mapping[tuple[str, ...], str | None]
    objects: tuple[str, ...]
    _lengths_by_first: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    _known_words: dict[str, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths: dict[str, set[int]] = defaultdict(set)
        for phrase in self.canonical_of_phrase:
            lengths[phrase[0]].add(len(phrase))
        by_first = {word: tuple(sorted(each, reverse=True)) for word, each in lengths.items() if max(each) > 1}
        object.__setattr__(self, "_lengths_by_first", by_first)

    def canonical(self, name: str) -> str | None:
        """Returns the canonical name of a category or synonym, or None."""
        return self.canonical_of_phrase.get(_words(name))

    def mentions(self, text: str) -> tuple[Mention, ...]:
        """Returns all mentions in order, including repeats; at each position the longest phrase wins.

        A word is looked up as written, then as a plural (`singular_forms`). If the text mentions a toilet, "seat" does
        not count as a chair.
        """
        spans = [(m.group().lower(), m.start(), m.end()) for m in _WORD_RE.finditer(text)]
        words = [word for word, _, _ in spans]
        toilet_seat = "toilet" in words or "toilets" in words
        found: list[Mention] = []
        at = 0
        while at < len(words):
            length, canonical = self._longest_phrase(words, at)
            if canonical is not None and not (toilet_seat and words[at : at + length] in (["seat"], ["seats"])):
                found.append(Mention(canonical, spans[at][1], spans[at + length - 1][2]))
            at += length
        return tuple(found)

    def _longest_phrase(self, words: list[str], at: int) -> tuple[int, str | None]:
        for length in self._lengths_by_first.get(words[at], ()):
            if at + length > len(words):
                continue
            *head, last = words[at : at + length]
            for form in (last, *singular_forms(last)):
                phrase = (*head, form)
                if phrase in self.canonical_of_phrase:
                    return length, self.canonical_of_phrase[phrase]
        return 1, self._of_word(words[at])

    def _of_word(self, word: str) -> str | None:
        """Returns the canonical name of a single word, or None."""
        if word[0].isdigit():  # numbers have no plural and would fill the cache
            return self.canonical_of_phrase.get((word,))
        if word not in self._known_words:
            if len(self._known_words) >= _MAX_KNOWN_WORDS:
                self._known_words.clear()
            forms = ((form,) for form in (word, *singular_forms(word)))
            named = (self.canonical_of_phrase[form] for form in forms if form in self.canonical_of_phrase)
            self._known_words[word] = next(named, None)
        return self._known_words[word]


def build_lexicon(lines: Iterable[Iterable[str]]) -> ObjectLexicon:
    """Builds a lexicon from the names of each object, canonical name first.

    A name shared by two objects is assigned to the later one with a warning, as in CHAIR's released code. A two-word
    rule is added if one of its words names an object and the file does not define the phrase.

    Raises:
        ValueError: There are no objects, or a name has no letter or digit.
    """
    phrases: dict[tuple[str, ...], str | None] = {}
    objects: list[str] = []
    for names in lines:
        canonical, *synonyms = [" ".join(_words(name)) for name in names]
        if canonical not in objects:
            objects.append(canonical)
        for name in (canonical, *synonyms):
            phrase = tuple(name.split())
            if not phrase:
                raise ValueError(f"a name of object {canonical!r} is empty; separate names by single commas")
            if phrases.get(phrase, canonical) != canonical:
                logger.warning("%r names both %r and %r; using the latter", name, phrases[phrase], canonical)
            phrases[phrase] = canonical
    if not objects:
        raise ValueError("there are no objects; write one object per line, its canonical name first")
    for phrase, target in _TWO_WORD_RULES.items():
        if phrase not in phrases and any((word,) in phrases for word in phrase):
            phrases[phrase] = phrases.get((target,)) if target is not None else None
    return ObjectLexicon(phrases, tuple(objects))


@lru_cache(maxsize=1 << 14)
def singular_forms(word: str) -> tuple[str, ...]:
    """Returns the possible singulars of `word`, most likely first; the lexicon decides which one is a name.

    Irregular plurals come from a short list. Otherwise -ies becomes -y, -ves becomes -f and -fe, and -s and -es are
    removed.
    """
    if word in _IRREGULAR_PLURALS:
        return (_IRREGULAR_PLURALS[word],)
    forms: list[str] = []
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        forms.append(word[:-1])
    if word.endswith("es"):
        forms.append(word[:-2])
    return tuple(forms)


def _words(name: str) -> tuple[str, ...]:
    return tuple(_WORD_RE.findall(name.lower()))
