"""What a text says, as hashed tokens: words for the distance of two texts, and content that an image can contradict.

A token is a 32-bit hash whose two lowest bits hold a class. Equal words have equal tokens in every process.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bpo.bootstrap.changes import ChangeLexicon, Kind, words_of

# Classes of content: objects, attributes, counts and polarity; relations, which two true descriptions often word
# differently; and names that the lexicon does not know.
STRONG, RELATION, UNKNOWN = 0, 1, 2
# Classes of words in the distance.
STYLE, CONTENT, QUESTION, NEIGHBOURS = range(4)

_MAX_KNOWN_WORDS = 1 << 16
# True of any object: "a dog" and "one dog" describe the same image.
_VAGUE_COUNTS = frozenset("one 1 single another all both".split())
_NEGATIONS = frozenset("no not without never neither nor n't cannot none".split())
_NEGATED_WORDS = 4
_ARTICLES = frozenset("a an the this that these those".split())


@dataclass(frozen=True, slots=True)
class Content:
    """Tokens of one text.

    Attributes:
        words: One token for each occurrence of a word, and for each two content words in a row; the n-th occurrence is
            a token of its own.
        said: Distinct content.
        implied: Distinct content, and what may be true together with it: more general names, similar attributes.
    """

    words: tuple[int, ...]
    said: tuple[int, ...]
    implied: tuple[int, ...]


class ContentReader:
    """Reads the content of texts with a lexicon.

    Args:
        lexicon: Classifies words; names of one object are one token.
    """

    def __init__(self, lexicon: ChangeLexicon):
        self._lexicon = lexicon
        self._known: dict[str, tuple[str, Kind | None]] = {}
        self._tokens: dict[tuple[str, int], int] = {}

    def read(self, text: str, answers_question: bool = False) -> Content:
        """The content of a text.

        Args:
            answers_question: Whether yes and no count, and relations as much as objects. In a description they do not:
                "no people" may be true of any image, so objects within a few words after a negation do not count
                either, and "a left of b" may be true together with "b right of a".
        """
        found = [self._classified(word) for word in words_of(text)]
        content = [name for name, kind in found if kind is not None]
        words = self._numbered([name for name, kind in found if kind is None], STYLE)
        words += self._numbered(content, CONTENT)
        words += self._numbered([f"{a} {b}" for a, b in pairwise(content)], NEIGHBOURS)
        objects = {mention.object for mention in self._lexicon.objects.mentions(text)}
        class_of_kind = _IN_ANSWERS if answers_question else _IN_DESCRIPTIONS
        said = {(name, class_of_kind[kind]) for name, kind in found if kind in class_of_kind}
        said -= {(name, STRONG) for name in _VAGUE_COUNTS}
        said |= {(name, UNKNOWN) for name in _unknown_names(found)}
        if not answers_question:
            objects -= _negated_objects(text, self._lexicon)
        # Unknown words in an object's name, such as `teddy` of `teddy bear`, are not content of their own.
        parts = {part for name in objects for part in name.split()}
        said = {entry for entry in said if entry[1] != UNKNOWN or entry[0] not in parts}
        said |= {(name, STRONG) for name in objects}
        general = {(name, of) for word, of in said for name in self._lexicon.general.get(word, ())}
        own, implied = (tuple(sorted({self._token(*entry) for entry in each})) for each in (said, said | general))
        return Content(tuple(words), own, implied)

    def question_words(self, question: str) -> list[int]:
        """Tokens of a question's distinct words."""
        return [self._token(f"?{word}", QUESTION) for word in sorted(set(words_of(question)))]

    def _numbered(self, names: list[str], of_class: int) -> list[int]:
        tokens = [self._token(name, of_class) for name in dict.fromkeys(names)]
        if len(tokens) < len(names):
            repeats = ((name, number) for name, count in Counter(names).items() for number in range(2, count + 1))
            tokens += [self._token(f"{name}#{number}", of_class) for name, number in repeats]
        return tokens

    def _classified(self, word: str) -> tuple[str, Kind | None]:
        """The canonical name of a word, and its kind."""
        known = self._known.get(word)
        if known is None:
            if len(self._known) >= _MAX_KNOWN_WORDS:
                self._known.clear()
            known = self._known[word] = self._lexicon.meaning(word), self._lexicon.kind(word)
        return known

    def _token(self, name: str, of_class: int) -> int:
        token = self._tokens.get((name, of_class))
        if token is None:
            if len(self._tokens) >= _MAX_KNOWN_WORDS:
                self._tokens.clear()
            token = self._tokens[name, of_class] = hash32(name) & ~3 | of_class
        return token


# Objects are found as phrases, by `ObjectLexicon.mentions`.
_IN_DESCRIPTIONS: dict[Kind | None, int] = {"attribute": STRONG, "count": STRONG, "relation": RELATION}
_IN_ANSWERS: dict[Kind | None, int] = {**_IN_DESCRIPTIONS, "polarity": STRONG, "relation": STRONG}


def class_of(tokens: np.ndarray) -> np.ndarray:
    return tokens & np.uint32(3)


def hash32(name: str) -> int:
    """A 32-bit hash, equal in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big")


def hash64(*names: object) -> int:
    """A 64-bit hash, equal in every process."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _unknown_names(found: list[tuple[str, Kind | None]]) -> set[str]:
    """Unknown words that are names: those after an article, attribute or count; all in a text without articles."""
    has_articles = any(name in _ARTICLES for name, _ in found)
    return {
        name
        for (before, kind_before), (name, kind) in pairwise([("", None), *found])
        if kind == "other" and (not has_articles or before in _ARTICLES or kind_before in ("attribute", "count"))
    }


def _negated_objects(text: str, lexicon: ChangeLexicon) -> set[str]:
    """Objects whose every mention stands within a few words after a negation."""
    if not _NEGATIONS & set(words_of(text)):
        return set()
    negated: dict[str, bool] = {}
    for mention in lexicon.objects.mentions(text):
        clause = re.split(r"[.,;:!?]", text[: mention.start])[-1]
        after_negation = bool(_NEGATIONS & set(words_of(clause)[-_NEGATED_WORDS:]))
        negated[mention.object] = negated.get(mention.object, True) and after_negation
    return {name for name, value in negated.items() if value}
