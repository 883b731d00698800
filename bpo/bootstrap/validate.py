"""Why a bootstrapped completion is refused: pure functions of the annotation and the completion.

A negative that is empty, says what the annotation says, or is broken text teaches nothing or the wrong thing: the model
would learn from its form, not from what it gets wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

# Spellings of image places in common model families, beside the special tokens of the model in use.
KNOWN_PLACEHOLDERS = (
    "<image>",
    "<video>",
    "<img>",
    "<|image|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<image_placeholder>",
)
REASONS = (
    "empty",
    "unfinished",
    "too-long",
    "placeholder",
    "degenerate",
    "unchanged",
    "same-content",
)

_MAX_LOOP_WORDS = 8
_MAX_LOOP_REPEATS = 3
_CHARACTER_LOOP = re.compile(r"(\w{1,20}?)\1{7,}")


def count_words(text: str) -> int:
    """Words as the paper's limit of 350 counts them: separated by white space."""
    return len(text.split())


def content_key(text: str) -> tuple[str, ...]:
    """The words in order of the alphabet, without case and punctuation.

    Equal keys mean the same words in another order. That also holds for a few true changes ("a left of b", "b left of
    a"); they are refused with the many mere reorderings.
    """
    return tuple(sorted(_words(text)))


def has_placeholder(text: str, special_tokens: Iterable[str]) -> bool:
    """Whether a placeholder or special token stands in the text, in any case."""
    folded = text.casefold()
    return any(token and token.casefold() in folded for token in (*KNOWN_PLACEHOLDERS, *special_tokens))


def is_degenerate(text: str) -> bool:
    """Whether the text is broken: little but punctuation, or the same phrase over and over.

    - fewer than half of the pieces between white space hold a letter or digit (", , a , a"), or
    - a phrase of up to 8 words stands more than 3 times in a row, or
    - fewer than a quarter of 12 or more words are distinct, or
    - a run of characters stands 8 times in a row within a word.
    """
    pieces = text.split()
    if 2 * sum(any(c.isalnum() for c in piece) for piece in pieces) < len(pieces):
        return True
    words = _words(text)
    if len(words) >= 12 and 4 * len(set(words)) < len(words):
        return True
    return bool(_CHARACTER_LOOP.search(text)) or any(_loops(words, size) for size in range(1, _MAX_LOOP_WORDS + 1))


def refusal(
    response: str,
    annotation: str,
    *,
    max_words: int,
    special_tokens: Iterable[str] = (),
    finished: bool = True,
) -> str | None:
    """The reason to refuse a negative, the first of `REASONS` that holds, or None.

    Args:
        response: The bootstrapped completion.
        annotation: The dataset's answer to the same prompt.
        max_words: Longest completion in words.
        special_tokens: Control tokens of the model in use, as text.
        finished: False where generation was cut off before the text ended.
    """
    text = response.strip()
    if not text:
        return "empty"
    if not finished:
        return "unfinished"
    if count_words(text) > max_words:
        return "too-long"
    if has_placeholder(text, special_tokens):
        return "placeholder"
    # An annotation may be a table or a line of digits: what it does, the negative may do.
    if is_degenerate(text) and not is_degenerate(annotation):
        return "degenerate"
    if text == annotation.strip():
        return "unchanged"
    if content_key(text) == content_key(annotation):
        return "same-content"
    return None


def annotation_refusal(response: str, *, max_words: int) -> str | None:
    """The reason to leave a whole record out because of its annotation, or None."""
    if not response.strip():
        return "empty"
    return "too-long" if count_words(response) > max_words else None


def _words(text: str) -> list[str]:
    """Case-folded runs of letters and digits; where there are none, the pieces between white space."""
    return re.findall(r"\d+(?:[.,]\d+)*|[^\W_]+(?:['’][^\W_]+)*", text.casefold()) or text.casefold().split()


def _loops(words: list[str], size: int) -> bool:
    """Whether a phrase of `size` words stands more than `_MAX_LOOP_REPEATS` times in a row.

    words[i] == words[i + size] for (repeats - 1) * size positions in a row says just that.
    """
    equal = (a == b for a, b in zip(words, words[size:], strict=False))
    longest = max((sum(1 for _ in run) for same, run in groupby(equal) if same), default=0)
    return longest >= _MAX_LOOP_REPEATS * size
