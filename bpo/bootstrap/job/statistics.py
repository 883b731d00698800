"""Statistics of the negatives of each source as JSON: lengths, similarity to the annotation, objects added and dropped.

One pass in constant memory: counts and histograms only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bpo.bootstrap.changes import ChangeLexicon, changed_objects, find_changes

SIMILARITY_BINS = 10
MOST_COMMON = 20


@dataclass
class SourceStatistics:
    """Accumulates kept negatives of one source.

    Attributes:
        sampled_every: One group in this many is sampled.
    """

    sampled_every: int = 1
    words: Counter[int] = field(default_factory=Counter)
    similarity: list[int] = field(default_factory=lambda: [0] * SIMILARITY_BINS)
    changed: Counter[str] = field(default_factory=Counter)
    objects_added: Counter[str] = field(default_factory=Counter)
    objects_dropped: Counter[str] = field(default_factory=Counter)

    def add(self, annotation: str, response: str, lexicon: ChangeLexicon) -> None:
        changes = find_changes(annotation, response, lexicon)
        self.words[len(response.split())] += 1
        self.similarity[min(SIMILARITY_BINS - 1, int((1 - changes.share) * SIMILARITY_BINS))] += 1
        self.changed.update(changes.kinds)
        added, dropped = changed_objects(annotation, response, lexicon)
        self.objects_added.update(added)
        self.objects_dropped.update(dropped)

    def to_json(self) -> dict[str, Any]:
        """`similarity_histogram[i]` counts negatives that keep i/10 to (i + 1)/10 of the longer text's words."""
        return {
            "sampled_every": self.sampled_every,
            "negatives": self.words.total(),
            "words": {f"p{percent}": percentile(self.words, percent) for percent in (5, 50, 95)},
            "similarity_histogram": self.similarity,
            "kinds_of_change": dict(sorted(self.changed.items())),
            "objects_added": dict(self.objects_added.most_common(MOST_COMMON)),
            "objects_dropped": dict(self.objects_dropped.most_common(MOST_COMMON)),
        }


def percentile(counts: Counter[int], percent: float) -> int | None:
    """The smallest value that at least `percent` % of the values do not exceed; None without values."""
    wanted = counts.total() * percent / 100
    for value, reached in _running(counts):
        if reached >= wanted:
            return value
    return None


def _running(counts: Counter[int]) -> Iterator[tuple[int, int]]:
    reached = 0
    for value in sorted(counts):
        reached += counts[value]
        yield value, reached
