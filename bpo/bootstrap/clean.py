"""Extracts the rewritten text from an LLM reply: strips labels, quotes, chit-chat and invented turns."""

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
# An invented turn starts on its own line; everything from there on is cut.
_NEXT_TURN = re.compile(
    r"""\n\s*(?:\#{1,4}\s*|\*\*)?
    (?:user|human|assistant|system|question|description|original(?:\s+\w+)?|modified\s+\w+|note|explanation)
    (?:\*\*)?\s*:""",
    re.IGNORECASE | re.VERBOSE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "`": "`", "«": "»"}


def clean_rewriting(text: str, original: str) -> tuple[str, bool]:
    """Returns the rewriting, and whether the text continued with another turn (so the rewriting is complete).

    Text is removed only if it matches a label, a preamble, a pair of quotes or a turn, and labels, quotes and turns
    that the original also has are kept.

    Args:
        text: The LLM's reply.
        original: The annotation that was rewritten.
    """
    cleaned = text.strip()
    original = original.strip()
    cleaned = _without_quotes(_PREAMBLE.sub("", cleaned, count=1).lstrip(), original)
    if not _LABEL.match(original):
        cleaned = _LABEL.sub("", cleaned, count=1)
    next_turn = None
    if not _NEXT_TURN.search("\n" + original):
        next_turn = _NEXT_TURN.search(cleaned)
        cleaned = cleaned[: next_turn.start()] if next_turn else cleaned
    return _without_quotes(cleaned.strip(), original), next_turn is not None


def _without_quotes(text: str, original: str) -> str:
    closing = _QUOTES.get(text[:1])
    if closing is None or len(text) < 2 or not text.endswith(closing):
        return text
    if original[:1] == text[:1] or closing in text[1:-1]:
        return text
    return text[1:-1].strip()
