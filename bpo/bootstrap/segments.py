"""Segments of annotations that the model generates again, between their own start and end (SAPO, arXiv 2405.20830)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from bpo.config.bootstrap import SegmentConfig
from bpo.job.seeds import derive_seed

# Tokens that the method keeps after a segment, if the annotation is long enough.
_KEPT_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of an answer; all values are in tokens.

    Attributes:
        start: Position t of its first token.
        length: Number of tokens S to generate in its place.
        prefix: Tokens before it.
        suffix: Tokens after it, without the end token of the answer.
    """

    start: int
    length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def join(self, generated: Sequence[int], ended: bool) -> tuple[int, ...]:
        """The answer y[:t] + generated + y[t + S:]; without y[t + S:] if the model ended its answer in the segment."""
        return (*self.prefix, *generated, *(() if ended else self.suffix))

    def texts(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, str]:
        """The texts before and after the segment of an answer `ids`.

        A character in which the segment begins is generated as a whole; one in which it ends is kept.

        Args:
            decode: Gives the text of tokens, with white space at its ends.
        """
        whole = decode(ids)
        before = commonprefix([decode(self.prefix), whole])
        through = commonprefix([decode(ids[: self.start + self.length]), whole])
        return before, whole[len(through) :]


def cut_segment(ids: Sequence[int], seed: int, options: SegmentConfig) -> Segment:
    """The segment of S = min(max_tokens, length) tokens at t ~ U{0 .. length - 3 - S}, or at 0 if that is negative.

    Args:
        ids: Tokens of the annotation, without its end token.
        seed: Determines t.
    """
    length = min(options.max_tokens, len(ids))
    places = max(len(ids) - _KEPT_TOKENS - length, 0) + 1
    start = derive_seed(seed, "segment") % places
    return Segment(start, length, tuple(ids[:start]), tuple(ids[start + length :]))
