"""Extracts the rewritten text from an LLM reply: strips labels, quotes, chit-chat and invented turns."""

from __future__ import annotations

import re

_LABEL = re.compile(
    r"""^[*\#>\s-]{0,4}
    (?:the\s+)?(?:(?:modified|new|rewritten|revised|changed|altered|updated|other|wrong|similar)\s+)?
    (?:description|caption|answer|response|text|version|modified|output|assistant|photo)
    (?:\s+(?:is|reads|would\s+be|could\s+be))?
    \**\s?:\**\s*""",
    re.IGNORECASE | re.VERBOSE,
)
# Before the text, on a line of its own or, if it names the text that it introduces, on the same line.
_PREAMBLE = re.compile(
    r"""^(?:(?:sure|certainly|of\s+course|absolutely|okay|ok|alright)(?:\s+thing)?\b[^\n:]{0,120}:\s*
    |(?:here\s+is|here['’]s|here\s+are|this\s+is|below\s+is)\b[^\n:]{0,120}
        \b(?:description|caption|answer|response|version|text|photo|image|picture|sentence|rewrit\w*)\b[^\n:]{0,80}:\s*
    |(?:here\s+is|here['’]s|here\s+are)\b[^\n]{0,120}:\s*\n+
    |(?:sure|certainly|of\s+course|absolutely)(?:\s+thing)?!\s+)""",
    re.IGNORECASE | re.VERBOSE,
)
# An invented turn starts on its own line; everything from there on is cut.
_NEXT_TURN = re.compile(
    r"""\n\s*(?:\#{1,4}\s*|\*\*)?
    (?:(?:user|human|assistant|system|question|photo|description|original(?:\s+\w+)?|modified\s+\w+|note|explanation)
    (?:\*\*)?\s*:
    |(?:i\s+(?:have\s+)?(?:changed|replaced|added|removed|rewrote|modified)|i\s+hope|(?:please\s+)?let\s+me\s+know)\b)""",
    re.IGNORECASE | re.VERBOSE,
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "`": "`", "«": "»", "**": "**"}


def clean_rewriting(text: str, original: str) -> tuple[str, bool]:
    """Returns the rewriting, and whether the text continued with another turn (so the rewriting is complete).

    Text is removed only if it matches a label, a preamble, a pair of quotes or a turn, and those that the original also
    has are kept.

    Args:
        text: The LLM's reply.
        original: The annotation that was rewritten.
    """
    cleaned = text.strip()
    original = original.strip()
    if not _PREAMBLE.match(original):
        cleaned = _PREAMBLE.sub("", cleaned, count=1).lstrip()
    cleaned = _without_quotes(cleaned, original)
    if not _LABEL.match(original):
        cleaned = _LABEL.sub("", cleaned, count=1)
    next_turn = None
    if not _NEXT_TURN.search("\n" + original):
        next_turn = _NEXT_TURN.search(cleaned)
        cleaned = cleaned[: next_turn.start()] if next_turn else cleaned
    return _without_quotes(cleaned.strip(), original), next_turn is not None


def _without_quotes(text: str, original: str) -> str:
    opening = "**" if text.startswith("**") else text[:1]
    closing, size = _QUOTES.get(opening), len(opening)
    if closing is None or len(text) < 2 * size or not text.endswith(closing):
        return text
    if original.startswith(opening) or closing in text[size:-size]:
        return text
    return text[size:-size].strip()
