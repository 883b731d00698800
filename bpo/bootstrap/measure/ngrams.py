"""Hashed word 1- and 2-grams of a text: the features of text-only models.

Tokens are case-folded words, numbers, single CJK characters and punctuation marks, between a begin and an end mark; the
marks make "starts with", "ends without a full stop" and the length of one-word answers visible as 2-grams. The hash is
CRC-32 mixed by a multiplication, so ids are the same in every process and on every machine.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

import numpy as np

BEGIN, END = "<s>", "</s>"
MAX_TOKENS = 2000  # the rest of a longer text is ignored

_TOKEN_RE = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]|\d+(?:[.,]\d+)*|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+(?:['’-][^\W\d_]+)*|[^\w\s]|_"
)
_MIX = np.uint32(2654435761)  # 2^32 divided by the golden ratio


def tokens_of(text: str) -> list[str]:
    """Case-folded tokens of at most `MAX_TOKENS`, without the marks."""
    return _TOKEN_RE.findall(text.casefold())[:MAX_TOKENS]


def ngram_ids(text: str, bits: int = 18) -> np.ndarray:
    """Ids in [0, 2^bits) of the n tokens and of the n + 1 pairs of neighbours, begin and end included: [2n + 1] int64.

    Repeats are kept. The order is that of `ngrams`.

    Raises:
        ValueError: `bits` is not in [1, 32].
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits is {bits}; it must be in [1, 32]")
    marked = np.array([_hash(token) for token in (BEGIN, *tokens_of(text), END)], dtype=np.uint32)
    # The product of the left neighbour makes "a b" differ from "b a".
    mixed = np.concatenate([marked[1:-1], marked[:-1] * _MIX ^ marked[1:]]) * _MIX
    return (mixed >> np.uint32(32 - bits)).astype(np.int64)


def ngrams(text: str) -> list[str]:
    """The n-grams as text, in the order of `ngram_ids`: tokens, then neighbours with a space between."""
    marked = (BEGIN, *tokens_of(text), END)
    return [*marked[1:-1], *(f"{left} {right}" for left, right in zip(marked, marked[1:], strict=False))]


@lru_cache(maxsize=1 << 16)
def _hash(token: str) -> int:
    return zlib.crc32(token.encode("utf-8", "surrogatepass"))
