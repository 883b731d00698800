"""Takes a rewriting out of what an LLM wraps round it: labels, quotes, pleasantries, turns it went on to invent."""

from __future__ import annotations

import re

_LABEL = re.compile(
    r"""^[*\#>\s-]{0,4}
    (?:(?:modified|new|rewritten|revised|changed|altered|updated)\s+)?
    (?:description|caption|answer|response|text|version|modified|output|assistant)
    \**\s?:\**\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|here is|here's|here are)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE
)
# A new turn begins on its own line; what follows was never asked for.
_NEXT_TURN = re.compile(
    r"""\n\s*(?:\#{1,4}\s*|\*\*)?
    (?:user|human|assistant|system|question|description|original(?:\s+\w+)?|modified\s+\w+|note|explanation)
    (?:\*\*)?\s*:""",
    re.IGNORECASE | re.VERBOSE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "`": "`", "«": "»"}


def clean_rewriting(text: str, original: str) -> tuple[str, bool]:
    """The rewriting alone, and whether the text went on to another turn (so that the rewriting is complete).

    Nothing is taken away by position: a first character is dropped only where it is one of a pair of quotes or part of
    a label, and nothing that the original has too is taken for a label, a quote or a turn.

    Args:
        text: What the LLM said.
        original: The annotation it was to rewrite.
    """
    cleaned = text.strip()
    original = original.strip()
    cleaned = _without_quotes(_PREAMBLE.sub("", cleaned, count=1).lstrip(), original)
    if not _LABEL.match(original):
        cleaned = _LABEL.sub("", cleaned, count=1)
    went_on = None
    if not _NEXT_TURN.search("\n" + original):
        went_on = _NEXT_TURN.search(cleaned)
        cleaned = cleaned[: went_on.start()] if went_on else cleaned
    return _without_quotes(cleaned.strip(), original), went_on is not None


def _without_quotes(text: str, original: str) -> str:
    closing = _QUOTES.get(text[:1])
    if closing is None or len(text) < 2 or not text.endswith(closing):
        return text
    if original[:1] == text[:1] or closing in text[1:-1]:
        return text
    return text[1:-1].strip()
