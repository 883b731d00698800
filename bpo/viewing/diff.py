"""A negative against its annotation, word by word, with the objects of a lexicon marked: what the page draws.

A segment is `[op, text]` or `[op, text, object]`. Ops: `=` in both (and the space after what is not), `+` only in the
negative, `-` only in the annotation. A replaced passage is its `-` followed by its `+`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from bpo.data.lexicon import Mention, ObjectLexicon

Segment = list[str]

# White space goes with the word before it, so that joined segments are the text.
_PIECE_RE = re.compile(r"(?:[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_+)\s*|\s+")


def diff_segments(annotation: str, response: str, lexicon: ObjectLexicon) -> list[Segment]:
    """The `=` and `+` segments joined are `response`; the `=` and `-` ones are `annotation`, but for white space."""
    before, after = _PIECE_RE.findall(annotation), _PIECE_RE.findall(response)
    matcher = SequenceMatcher(None, [_key(p) for p in before], [_key(p) for p in after], autojunk=False)
    mentions = lexicon.mentions(response)
    segments: list[Segment] = []
    at = 0
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            segments.append(["-", "".join(before[start:end]).rstrip()])
        text = "".join(after[other_start:other_end])
        words = text if tag == "equal" else text.rstrip()
        segments += _marked("=" if tag == "equal" else "+", words, at, mentions)
        if len(words) < len(text):
            segments.append(["=", text[len(words) :]])
        at += len(text)
    return segments


def plain_segments(text: str, lexicon: ObjectLexicon) -> list[Segment]:
    """A text that is compared with nothing, objects marked."""
    return list(_marked("=", text, 0, lexicon.mentions(text)))


def _marked(op: str, text: str, offset: int, mentions: Sequence[Mention]) -> Iterator[Segment]:
    """`text`, which begins at `offset` of the whole, cut where a mention begins or ends."""
    at, end = offset, offset + len(text)
    for mention in mentions:
        first, last = max(mention.start, at), min(mention.end, end)
        if first >= last:
            continue
        if first > at:
            yield [op, text[at - offset : first - offset]]
        yield [op, text[first - offset : last - offset], mention.object]
        at = last
    if at < end:
        yield [op, text[at - offset :]]


def _key(piece: str) -> str:
    return piece.strip().casefold()
