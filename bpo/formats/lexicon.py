"""Finds the objects that a text mentions: synonyms, plurals and CHAIR's double-word rules (arXiv 1809.02156).

A synonyms file has one object per line, its canonical name first: `person, man, woman, child`.

Words are those of nltk's `word_tokenize`, on which CHAIR's released code relies: `dog-like`, `dog/cat` and `dog_cat`
are one word each and name no object, and punctuation separates the words of a phrase. Where the released code loses or
doubles an object by accident, this module does not follow it:

- A name that looks like a plural counts as written. The released code makes `bu` of bus (minibus, airbus).
- `ties`, `canoes`, `thieves`, `collies`, `magpies` and the like are plurals, which the released code does not know.
- A phrase of the synonyms file is one mention. The released code has a list of phrases of two words, so `stove top
  oven` is two mentions of an oven there.
- Space round the names of the synonyms file, and capitals in it, have no effect. In CHAIR's own file they hide
  `motor bike`, `cheesecake` and `iPhone` from the released code.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

logger = logging.getLogger(__name__)

# What separates words for nltk's `word_tokenize`, with clitics and the full stops that end a sentence.
_MARKS = r"""\s;@\#$%&?!*"`()\[\]{}<>«»“”„‘’\u2012-\u2015"""
_SEPARATOR = re.compile(
    rf"""
    [{_MARKS}]
    | [:,](?!\d)
    | --
    | \.{{2,}}
    | \.(?=[\s)";}}\]*:@'({{\[”’»]|$)
    | (?:n't|'(?:s|m|d|ll|re|ve)?)(?=[{_MARKS}:,.']|--|$)
    | (?<!\w)'
    """,
    re.VERBOSE | re.IGNORECASE,
)
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

# Endings that are plurals also in compounds: gentlemen, grandchildren.
_IRREGULAR_ENDINGS = {
    "children": "child",
    "feet": "foot",
    "geese": "goose",
    "men": "man",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "teeth": "tooth",
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
    _vocabulary: frozenset[str] = field(init=False, repr=False, compare=False)
    _longest: int = field(init=False, repr=False, compare=False)
    _known_forms: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = frozenset(word for phrase in self.canonical_of_phrase for word in phrase)
        object.__setattr__(self, "_vocabulary", words)
        object.__setattr__(self, "_longest", max(map(len, self.canonical_of_phrase)))

    def canonical(self, name: str) -> str | None:
        """Returns the canonical name of a category or synonym, or None."""
        return self.canonical_of_phrase.get(_phrase(name))

    def mentions(self, text: str) -> tuple[Mention, ...]:
        """Returns all mentions in order, including repeats; at each position the longest phrase wins.

        A word is looked up as written, then as a plural (`singular_forms`). The words of a phrase have only white space
        between them. If the text mentions a toilet, "seat" does not count as a chair.
        """
        spans = _word_spans(text)
        forms = [self._forms(text[start:end].lower()) for start, end in spans]
        toilet = any("toilet" in each for each in forms)
        found: list[Mention] = []
        at = 0
        while at < len(spans):
            phrase = self._longest_phrase(text, spans, forms, at) if forms[at] else ()
            canonical = self.canonical_of_phrase[phrase] if phrase else None
            last = at + max(len(phrase), 1) - 1
            if canonical is not None and not (toilet and phrase == ("seat",)):
                found.append(Mention(canonical, spans[at][0], spans[last][1]))
            at = last + 1
        return tuple(found)

    def _longest_phrase(
        self, text: str, spans: list[tuple[int, int]], forms: list[tuple[str, ...]], at: int
    ) -> tuple[str, ...]:
        """The longest phrase that starts with word `at`, or ()."""
        end = at + 1
        while (
            end < min(at + self._longest, len(spans))
            and forms[end]
            and text[spans[end - 1][1] : spans[end][0]].isspace()
        ):
            end += 1
        for stop in range(end, at, -1):
            for phrase in itertools.product(*forms[at:stop]):
                if phrase in self.canonical_of_phrase:
                    return phrase
        return ()

    def _forms(self, word: str) -> tuple[str, ...]:
        """The word as written and its singulars, those that occur in phrases."""
        if word[0].isdigit():  # numbers have no plural and would fill the cache
            return (word,) if word in self._vocabulary else ()
        if word not in self._known_forms:
            if len(self._known_forms) >= _MAX_KNOWN_WORDS:
                self._known_forms.clear()
            forms = dict.fromkeys((word, *singular_forms(word)))
            self._known_forms[word] = tuple(form for form in forms if form in self._vocabulary)
        return self._known_forms[word]


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
        canonical, *synonyms = [" ".join(_phrase(name)) for name in names]
        if canonical not in objects:
            objects.append(canonical)
        for name in (canonical, *synonyms):
            phrase = tuple(name.split())
            if not any(map(str.isalnum, name)):
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

    Irregular plurals come from a short list of endings. Otherwise -ies becomes -y and -ie, -ves becomes -f, -fe and
    -ve, -es is removed after a sibilant or o, and -s after anything but s.
    """
    for ending, singular in _IRREGULAR_ENDINGS.items():
        if word.endswith(ending):
            return (word.removesuffix(ending) + singular,)
    if not word.endswith("s") or word.endswith("ss"):
        return ()
    forms = [word[:-1]]
    if word.endswith("ies"):
        forms.insert(0, word[:-3] + "y")
    if word.endswith("ves"):
        forms = [word[:-3] + "f", word[:-3] + "fe", *forms]
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms.append(word[:-2])
    return tuple(forms)


def _word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word: what is between separators."""
    starts, ends = [0], []
    for separator in _SEPARATOR.finditer(text):
        ends.append(separator.start())
        starts.append(separator.end())
    return [(start, end) for start, end in zip(starts, [*ends, len(text)], strict=True) if start < end]


def _phrase(name: str) -> tuple[str, ...]:
    return tuple(name[start:end].lower() for start, end in _word_spans(name))
