"""Differences between a negative and its annotation: words added and dropped, and whether the content changes.

A lexicon classifies the changed words as objects, attributes, counts, relations and polarity, maps the names of one
object to each other, and lists style words, whose change does not affect the content. Unknown words count as a change:
no lexicon is complete, and refusing a real error loses it, while keeping a harmless pair costs little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from bpo.formats.lexicon import ObjectLexicon, build_lexicon, singular_forms

Kind = Literal["object", "attribute", "count", "relation", "polarity", "other"]
_LISTS: dict[str, Kind] = {
    "attributes": "attribute",
    "counts": "count",
    "relations": "relation",
    "polarity": "polarity",
}
_SCRIPTS = (
    ("latin", r"[A-Za-z\u00c0-\u024f]"),
    ("cyrillic", r"[\u0400-\u04ff]"),
    ("greek", r"[\u0370-\u03ff]"),
    ("arabic", r"[\u0600-\u06ff]"),
    ("hebrew", r"[\u0590-\u05ff]"),
    ("devanagari", r"[\u0900-\u097f]"),
    ("thai", r"[\u0e00-\u0e7f]"),
    ("hangul", r"[\u1100-\u11ff\uac00-\ud7af]"),
    ("cjk", r"[\u3040-\u30ff\u3400-\u9fff]"),
)
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
_MAX_MEANINGS = 1 << 14
_LONG_WORDS = 2000
_WORD_RE = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*")


@dataclass(frozen=True)
class ChangeLexicon:
    """Objects with their names, the kind of every other known word, and style words.

    Attributes:
        scale_of_word: The number of the line that lists an attribute, count or relation: words of one line can take
            each other's place.
        general: A word -> others that are true of whatever it is true of, such as `person` for `man`, or may well be,
            such as `large` for `big`.
    """

    objects: ObjectLexicon
    kind_of_word: Mapping[str, Kind]
    style: frozenset[str]
    scale_of_word: Mapping[str, int] = field(default_factory=dict)
    general: Mapping[str, frozenset[str]] = field(default_factory=dict)
    _meanings: dict[str, str] = field(default_factory=dict, repr=False, compare=False)  # a cache

    def kind(self, word: str) -> Kind | None:
        """The kind of a word; None for style words."""
        if word[:1].isdigit():
            return "count"
        word = word.removesuffix("'s").removesuffix("’s")
        for form in (word, *singular_forms(word)):
            if form in self.kind_of_word:
                return self.kind_of_word[form]
            if self.objects.canonical(form):
                return "object"
        return None if word in self.style else "other"

    def meaning(self, word: str) -> str:
        """One name for all forms and synonyms of an object, and digits for a number: `bikes` and `bicycle`."""
        word = _NUMBERS.get(word, word)
        if word[:1].isdigit():
            return self.objects.canonical(word) or word
        known = self._meanings.get(word)
        if known is None:
            if len(self._meanings) >= _MAX_MEANINGS:
                self._meanings.clear()
            forms = (word, *singular_forms(word))
            known = next((name for form in forms if (name := self.objects.canonical(form))), word)
            self._meanings[word] = known
        return known


@dataclass(frozen=True, slots=True)
class Changes:
    """Differences between a negative and its annotation.

    Attributes:
        added: Words that only the negative has, as aligned, in order.
        dropped: Words that only the annotation has.
        kinds: Kinds of the changed words; empty if only the style changed.
        new: Meanings of content words that only the negative has, wherever they are in the text.
        gone: Meanings of content words that only the annotation has.
        distance: Words to insert, delete or replace (by difflib's alignment, so an upper bound of the edit distance).
        share: `distance` over the words of the longer text, at most 1.
    """

    added: tuple[str, ...]
    dropped: tuple[str, ...]
    kinds: frozenset[Kind]
    new: frozenset[str]
    gone: frozenset[str]
    distance: int
    share: float


def words_of(text: str) -> list[str]:
    """Case-folded words and numbers; if there are none, the whitespace-separated pieces."""
    return _WORD_RE.findall(text.casefold()) or text.casefold().split()


def find_changes(annotation: str, response: str, lexicon: ChangeLexicon) -> Changes:
    """Aligns both texts word by word and classifies the differences."""
    before, after = words_of(annotation), words_of(response)
    added: list[str] = []
    dropped: list[str] = []
    distance = 0
    # Aligned by meaning, so that a synonym is not a change.
    meanings = [lexicon.meaning(w) for w in before], [lexicon.meaning(w) for w in after]
    # autojunk ignores frequent words in long texts, which would otherwise take seconds to compare.
    matcher = SequenceMatcher(None, *meanings, autojunk=max(len(before), len(after)) > _LONG_WORDS)
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag != "equal":
            dropped += before[start:end]
            added += after[other_start:other_end]
            distance += max(end - start, other_end - other_start)
    # A word that only moved is not a content change.
    gone = Counter(map(lexicon.meaning, dropped))
    come = Counter(map(lexicon.meaning, added))
    only_before, only_after = (
        {word: kind for word in words if (kind := lexicon.kind(word))} for words in (gone - come, come - gone)
    )
    return Changes(
        added=tuple(added),
        dropped=tuple(dropped),
        kinds=frozenset([*only_before.values(), *only_after.values()]),
        new=frozenset(only_after),
        gone=frozenset(only_before),
        distance=distance,
        share=min(1.0, distance / max(len(before), len(after), 1)),
    )


def changed_objects(annotation: str, response: str, lexicon: ChangeLexicon) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Objects of the lexicon mentioned only by the negative, and those mentioned only by the annotation."""
    before, after = (
        dict.fromkeys(mention.object for mention in lexicon.objects.mentions(text)) for text in (annotation, response)
    )
    return tuple(name for name in after if name not in before), tuple(name for name in before if name not in after)


@cache
def load_lexicon(path: str = "") -> ChangeLexicon:
    """Loads the shipped English lexicon, or a file of the same format.

    Raises:
        ValueError: the file is missing or malformed; names the file and the required lists.
    """
    where = path or "bpo/bootstrap/lexicon/en.yaml"
    tree = _read(path, "en.yaml")
    try:
        objects = build_lexicon([[name.strip() for name in line.split(",")] for line in tree["objects"]])
        kinds: dict[str, Kind] = {}
        scales: dict[str, int] = {}
        for number, (kind, entry) in enumerate((kind, e) for name, kind in _LISTS.items() for e in tree[name]):
            words = [word.strip().casefold() for word in entry.split(",")]
            kinds |= dict.fromkeys(words, kind)
            scales |= dict.fromkeys(words, number)
        general: dict[str, frozenset[str]] = {}
        for line in tree.get("general", ()):
            name, _, others = line.partition(":")
            for other in others.split(","):
                general[other.strip()] = general.get(other.strip(), frozenset()) | {name.strip()}
        for line in tree.get("alike", ()):
            words = [word.strip() for word in line.split(",")]
            general |= {word: general.get(word, frozenset()) | {*words} - {word} for word in words}
        style = frozenset(word.casefold() for word in tree["style"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: {type(error).__name__} {error}; required: the lists objects, {', '.join(_LISTS)} and style, all "
            "of strings (quote yes, no and numbers)"
        ) from error
    return ChangeLexicon(objects, kinds, style, scales, general)


@cache
def _function_words() -> dict[str, frozenset[str]]:
    return {language: frozenset(words) for language, words in _read("", "function_words.yaml").items()}


def language_of(text: str) -> tuple[str | None, str | None]:
    """The script of most letters of a text and, for Latin script, the language indicated by function words, if any.

    A language is reported if at least 3 of its function words occur, and more than of any other language.
    """
    # ASCII letters are all Latin, so most texts skip the other scripts.
    scripts = _SCRIPTS[:1] if text.isascii() else _SCRIPTS
    counts = {name: len(re.findall(pattern, text)) for name, pattern in scripts}
    script = max(counts, key=lambda name: counts[name])
    if not counts[script] or script != "latin":
        return (script if counts[script] else None), None
    words = Counter(words_of(text))
    known = {
        name: sum(count for word, count in words.items() if word in those) for name, those in _function_words().items()
    }
    best, second = sorted(known, key=lambda name: known[name], reverse=True)[:2]
    return script, (best if known[best] >= 3 and known[best] > known[second] else None)


def _read(path: str, shipped: str) -> dict[str, Any]:
    try:
        if not path:
            text = files("bpo.bootstrap").joinpath("lexicon").joinpath(shipped).read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"bootstrap.validate.lexicon {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"bootstrap.validate.lexicon {path}: not a YAML mapping; see bpo/bootstrap/lexicon/en.yaml")
    return tree
