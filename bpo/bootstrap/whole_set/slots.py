"""Words of a text that can be exchanged for others of their kind and form without breaking the grammar."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from bpo.bootstrap.changes import ChangeLexicon, load_lexicon, words_of
from bpo.bootstrap.inject import choose_mode, question_of
from bpo.bootstrap.whole_set.content import ContentReader
from bpo.config.negatives import EditKind
from bpo.config.training import Config
from bpo.formats.lexicon import singular_forms
from bpo.job.seeds import derive_seed
from bpo.records import Annotation

_WORD = re.compile(r"\d+|[^\W\d_]+(?:['’-][^\W\d_]+)*")
_INDEFINITE = frozenset({"a", "an"})
_DETERMINERS = frozenset("the this that these those its his her their my our your one another".split())
_POLARITY = frozenset({"yes", "no"})


@dataclass(frozen=True, slots=True)
class Slot:
    """A word, or a name of several words, at `text[start:end]`.

    Attributes:
        word: The words in lower case.
        kind: What they name.
        article: The span of an indefinite article before them; empty at `start` if there is none.
        form: Slots of equal form can exchange words: scale, number, and whether an article precedes.
    """

    start: int
    end: int
    word: str
    kind: EditKind
    article: tuple[int, int]
    form: str


def find_slots(text: str, lexicon: ChangeLexicon, kinds: frozenset[EditKind]) -> list[Slot]:
    """All slots of the given kinds, in the order of the text.

    Words whose meaning occurs twice are left out, as the text would contradict itself, and so are names of which an
    unknown word is perhaps a part ("a pine tree").
    """
    words = [(match.group().casefold(), *match.span()) for match in _WORD.finditer(text)]
    index_of_start = {start: index for index, (_, start, _) in enumerate(words)}
    spans: dict[int, tuple[int, EditKind, str]] = {}
    covered: set[int] = set()
    for mention in lexicon.objects.mentions(text):
        first = index_of_start.get(mention.start)
        if first is None or lexicon.kind_of_word.get(words[first][0]):
            continue  # inside a hyphenated word, or also the name of an attribute: "orange", "glass"
        covered.update(i for i in range(first, len(words)) if words[i][1] < mention.end)
        spans[first] = mention.end, "object", _number(text[mention.start : mention.end], lexicon)
    for index, (word, _, end) in enumerate(words):
        kind = "count" if word.isdecimal() else lexicon.kind_of_word.get(word)
        if index in covered or kind not in ("attribute", "count", "relation", "polarity"):
            continue
        if kind == "polarity" and (word not in _POLARITY or len(words) > 1):
            continue  # the rest of the answer would contradict it
        if word.isdecimal():
            if 2 <= int(word) <= 12:
                spans[index] = end, "count", "digits"
        elif kind == "polarity" or word in lexicon.scale_of_word:
            spans[index] = end, kind, str(lexicon.scale_of_word.get(word, ""))
    meanings = Counter(lexicon.meaning(word) for word, _, _ in words)
    return [
        _slot(text, words, index, end, kind, scale)
        for index, (end, kind, scale) in sorted(spans.items())
        if kind in kinds
        and meanings[lexicon.meaning(words[index][0])] == 1
        and (kind != "object" or not _is_unknown_name([word for word, _, _ in words[:index]], lexicon))
    ]


class SlotFinder:
    """Finds the slots of annotations under the options of a job."""

    def __init__(self, config: Config):
        self._lexicon = load_lexicon(config.bootstrap.validate.lexicon)
        self._kinds, self._seed = frozenset(config.bootstrap.edit.kinds), config.bootstrap.seed
        self._reader = ContentReader(self._lexicon)

    def of(self, annotation: Annotation) -> list[Slot]:
        return find_slots(annotation.response, self._lexicon, self._kinds)

    def choose(self, annotation: Annotation, attempt: int = 0) -> tuple[int, Slot] | None:
        """The slot at place `attempt` of a random order of kinds and slots, with its number in the text.

        None if there are fewer. Words that are in the question are left out.
        """
        question = question_of(annotation) if choose_mode("auto", annotation) == "qa" else ""
        asked = self._said(question)
        seed = derive_seed(self._seed, "edit", annotation.id)
        slots = self.of(annotation)
        free = [number for number, slot in enumerate(slots) if not asked & self._said(slot.word)]
        by_kind: dict[str, list[int]] = {}
        for number in sorted(free, key=lambda number: derive_seed(seed, "slot", number)):
            by_kind.setdefault(slots[number].kind, []).append(number)
        kinds = sorted(by_kind, key=lambda kind: derive_seed(seed, "kind", kind))
        # One slot of each kind before the second of any.
        ranked = sorted((place, kinds.index(kind), n) for kind in kinds for place, n in enumerate(by_kind[kind]))
        return (ranked[attempt][2], slots[ranked[attempt][2]]) if attempt < len(ranked) else None

    def _said(self, text: str) -> set[int]:
        return set(self._reader.read(text, answers_question=True).said) if text else set()


def phrase_of(text: str, slot: Slot) -> str:
    """The words of a slot with their indefinite article, in lower case."""
    return f"{text[slice(*slot.article)].casefold()} {slot.word}".strip()


def put(text: str, slot: Slot, phrase: str) -> str:
    """The text with the words of another slot of equal form, in the case of the words taken out.

    Args:
        phrase: The `phrase_of` the other slot.
    """
    start, end = slot.article
    article, word = phrase.split(" ", 1) if start < end else ("", phrase)
    article, word = _in_case(article, text[start:end]), _in_case(word, text[slot.start : slot.end])
    return text[:start] + article + text[end : slot.start] + word + text[slot.end :]


def _slot(text: str, words: list[tuple[str, int, int]], index: int, end: int, kind: EditKind, scale: str) -> Slot:
    start = words[index][1]
    before = words[index - 1] if index and not text[words[index - 1][2] : start].strip() else ("", start, start)
    has_article = before[0] in _INDEFINITE
    article = (before[1], before[2]) if has_article else (start, start)
    # A count has no article, and what precedes it matters little.
    context = "a" if has_article else "the" if before[0] in _DETERMINERS else "bare"
    return Slot(start, end, text[start:end].casefold(), kind, article, f"{kind} {scale} {context}")


def _is_unknown_name(before: list[str], lexicon: ChangeLexicon) -> bool:
    """Whether the last word is unknown and follows an article, attribute or count."""
    if not before or lexicon.kind(before[-1]) != "other":
        return False
    first = before[-2] if len(before) > 1 else ""
    return first in _INDEFINITE | _DETERMINERS or lexicon.kind(first) in ("attribute", "count")


def _number(name: str, lexicon: ChangeLexicon) -> str:
    """`plural` if the last word is the plural of a name, or has only a plural, such as `glasses`; else `singular`."""
    last = words_of(name)[-1]
    is_name = lexicon.objects.canonical(name) is not None
    only_plural = last.endswith("s") and not last.endswith(("ss", "us")) and bool(singular_forms(last))
    return "plural" if not is_name or only_plural else "singular"


def _in_case(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word
