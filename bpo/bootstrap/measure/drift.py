"""Is the sample still the data? Words, objects, attributes and lengths of the kept annotations against all.

Refusals and unfinished jobs shift them: if a source fails on long answers, or on one kind of object, training sees a
different world than the annotations describe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bpo.bootstrap.changes import ChangeLexicon, words_of

# Probability of any false alarm per type, over all words tried.
FALSE_ALARMS = 0.01
MOST_SHIFTED = 20

# A word is tried if this many of its records are expected among the kept ones.
_MIN_EXPECTED = 5.0
# Smaller shifts are not reported, however certain: Cohen's h, 2 |asin sqrt p - asin sqrt q|, or a factor.
_MIN_EFFECT, _MIN_FACTOR = 0.1, 2.0
_LENGTH_CLASSES = 5


@dataclass(frozen=True)
class Shift:
    """A word, object, attribute or class of length that is more or less frequent in the kept annotations.

    Attributes:
        what: `word`, `object`, `attribute` or `length` (of the answer, in words).
        share_all, share_kept: Fraction of all and of the kept annotations that have it.
        z: Signed deviation from a random choice, in standard deviations.
    """

    what: str
    name: str
    share_all: float
    share_kept: float
    z: float


@dataclass(frozen=True)
class Drift:
    """Kept annotations of one type against all of the sample.

    Attributes:
        num_all, num_kept: Annotations in the sample, and those with a pair of the type.
        num_tried: Words, objects, attributes and lengths tried.
        num_shifted: Those beyond chance and beyond the smallest reported effect.
        shifts: The most certain of these.
    """

    num_all: int
    num_kept: int
    num_tried: int
    num_shifted: int
    shifts: tuple[Shift, ...]


class Features:
    """The distinct words, objects, attributes and the class of length of each annotation.

    Memory is 8 bytes per distinct feature of an annotation.
    """

    def __init__(self, texts: Sequence[str], lexicon: ChangeLexicon):
        self._number_of: dict[tuple[str, str], int] = {}
        self._is_attribute: dict[str, bool] = {}
        lengths = [len(text.split()) for text in texts]
        edges = sorted({int(np.quantile(lengths or [0], q / _LENGTH_CLASSES)) for q in range(1, _LENGTH_CLASSES)})
        ids, sizes = [], []
        for text, length in zip(texts, lengths, strict=True):
            own = [self._number(feature) for feature in self._of(text, length, edges, lexicon)]
            ids.append(np.array(own, dtype=np.int64))
            sizes.append(len(own))
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
        self._record = np.repeat(np.arange(len(texts)), sizes)
        self.num_records = len(texts)

    def _of(self, text: str, length: int, edges: list[int], lexicon: ChangeLexicon) -> Iterator[tuple[str, str]]:
        words = set(words_of(text))
        yield from (("word", word) for word in sorted(words))
        yield from (("object", name) for name in sorted({m.object for m in lexicon.objects.mentions(text)}))
        for word in words - self._is_attribute.keys():
            self._is_attribute[word] = lexicon.kind(word) == "attribute"
        yield from (("attribute", word) for word in sorted(words) if self._is_attribute[word])
        place = int(np.searchsorted(edges, length))
        low = edges[place - 1] + 1 if place else 0
        yield "length", f"{low}-{edges[place]} words" if place < len(edges) else f"{low} words or more"

    def _number(self, feature: tuple[str, str]) -> int:
        return self._number_of.setdefault(feature, len(self._number_of))

    def drift(self, is_kept: np.ndarray) -> Drift:
        """Compares the kept annotations with all: `is_kept` [records] bool.

        The statistic is the signed root of the likelihood ratio of a share, which unlike the normal approximation holds
        for rare words, with the correction for drawing without replacement. Its threshold is Bonferroni's.
        """
        num_all, num_kept = self.num_records, int(is_kept.sum())
        counts_all = np.bincount(self._ids, minlength=len(self._number_of))
        if not 0 < num_kept < num_all:
            return Drift(num_all, num_kept, 0, 0, ())
        counts_kept = np.bincount(self._ids[is_kept[self._record]], minlength=len(self._number_of))
        share_all, share_kept = counts_all / num_all, counts_kept / num_kept
        tried = (share_all * num_kept >= _MIN_EXPECTED) & (counts_all < num_all)
        correction = (num_all - 1) / max(num_all - num_kept, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            present = np.where(share_kept > 0, share_kept * np.log(share_kept / share_all), 0.0)
            absent = np.where(share_kept < 1, (1 - share_kept) * np.log((1 - share_kept) / (1 - share_all)), 0.0)
            z = np.sign(share_kept - share_all) * np.sqrt(2 * num_kept * correction * np.maximum(present + absent, 0))
        threshold = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * max(int(tried.sum()), 1)))
        effect = 2 * np.abs(np.arcsin(np.sqrt(share_kept)) - np.arcsin(np.sqrt(share_all)))
        factor = np.maximum(share_kept, share_all) > _MIN_FACTOR * np.minimum(share_kept, share_all)
        shifted = np.flatnonzero(tried & (np.abs(z) > threshold) & ((effect > _MIN_EFFECT) | factor))
        names = list(self._number_of)
        order = sorted(shifted.tolist(), key=lambda number: (-abs(z[number]), names[number]))
        shifts = tuple(
            Shift(what, name, float(share_all[number]), float(share_kept[number]), _finite(z[number]))
            for number in order[:MOST_SHIFTED]
            for what, name in [names[number]]
        )
        return Drift(num_all, num_kept, int(tried.sum()), len(order), shifts)


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else math.copysign(1e9, value)
