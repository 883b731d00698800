"""Word-by-word diff of a negative against its annotation, with lexicon objects marked.

A segment is `[op, text]` or `[op, text, object]`. Ops: `=` in both texts (and the space after other segments), `+` only
in the negative, `-` only in the annotation. A replaced passage is an `x` segment (annotation) followed by `~` segments
(negative).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from bpo.formats.lexicon import Mention, ObjectLexicon

Segment = list[str]

# Above this number of pieces, frequent words are not used as anchors: run time would be quadratic in their number.
_LONG_PIECES = 2000
# Scripts written without spaces, in which each character is a piece: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


def _marks() -> str:
    """Character class of marks that combine with the preceding character: vowel signs, accents, variation selectors."""
    codes = [c for c in (*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)) if unicodedata.category(chr(c))[0] == "M"]
    spans: list[list[int]] = []
    for code in codes:
        if spans and code == spans[-1][1] + 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    tones = "\\U0001f3fb-\\U0001f3ff"  # skin tones
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in spans) + tones


def _piece_re() -> re.Pattern[str]:
    marks = _marks()
    joiners = "\u200c\u200d"
    letter = rf"(?:[^\W_{_UNSPACED}][{marks}{joiners}]*)"
    word = rf"{letter}+(?:['’-]{letter}+)*"
    # Flags are pairs of letters; families and professions are several emoji connected by joiners.
    flag = "[\U0001f1e6-\U0001f1ff]{2}"
    single = rf"[^\s_][{marks}]*(?:\u200d[^\w\s][{marks}]*)*"
    # Whitespace belongs to the preceding piece, so that the joined segments equal the text.
    return re.compile(rf"(?:{word}|{flag}|{single}|_+)\s*|\s+")


_PIECE_RE = _piece_re()


def diff_segments(annotation: str, response: str, lexicon: ObjectLexicon) -> list[Segment]:
    """Diff of two texts. `=`, `+`, `~` segments joined are `response`; `=`, `-`, `x` are `annotation` up to spaces."""
    before, after = _PIECE_RE.findall(annotation), _PIECE_RE.findall(response)
    matcher = SequenceMatcher(
        None, [_key(p) for p in before], [_key(p) for p in after], autojunk=max(len(before), len(after)) > _LONG_PIECES
    )
    marker = _Marker(lexicon.mentions(response))
    segments: list[Segment] = []
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            segments.append(["-" if tag == "delete" else "x", "".join(before[start:end]).rstrip()])
        text = "".join(after[other_start:other_end])
        words = text if tag == "equal" else text.rstrip()
        segments += marker.marked({"equal": "=", "insert": "+", "replace": "~"}.get(tag, "="), words)
        segments += marker.marked("=", text[len(words) :])
    return segments


def plain_segments(text: str, lexicon: ObjectLexicon) -> list[Segment]:
    """A text without a diff, objects marked."""
    return list(_Marker(lexicon.mentions(text)).marked("=", text))


class _Marker:
    """Splits consecutive pieces of a text where an object mention begins or ends."""

    def __init__(self, mentions: Sequence[Mention]):
        self._mentions = mentions
        self._next = 0
        self._offset = 0

    def marked(self, op: str, text: str) -> Iterator[Segment]:
        offset = at = self._offset
        end = self._offset = offset + len(text)
        while self._next < len(self._mentions) and at < end:
            mention = self._mentions[self._next]
            first, last = max(mention.start, at), min(mention.end, end)
            if first >= end:
                break
            if first > at:
                yield [op, text[at - offset : first - offset]]
            if first < last:
                yield [op, text[first - offset : last - offset], mention.object]
                at = last
            if mention.end > end:
                break
            self._next += 1
        if at < end:
            yield [op, text[at - offset :]]


def _key(piece: str) -> str:
    return piece.strip().casefold()
