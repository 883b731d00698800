"""Splits answers into sentences."""

from __future__ import annotations

import re

# Sentence marks with closing quotes and brackets, then space; or a mark of a script without spaces.
_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s)|[。！？]+["'”’)」』]*|\n(?=\s*\n)""")
# A full stop after these, or after a single capital letter or a number of a list, ends no sentence.
_NOT_AN_END = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|no|vs|etc|e\.g|i\.e|approx|fig|jr|sr)|\b[A-Z]|(?:^|\n)\s*\d+)\.$", re.IGNORECASE
)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The spans `text[start:end]` of the sentences, without the space between them."""
    spans = []
    start = 0
    for match in _END.finditer(text):
        if not _NOT_AN_END.search(text, max(start, match.end() - 12), match.end()):
            spans.append((start, match.end()))
            start = match.end()
    spans.append((start, len(text)))
    return [span for first, last in spans if (span := _stripped(text, first, last))[0] < span[1]]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
