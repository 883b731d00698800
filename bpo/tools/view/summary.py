"""Figures of each source of negatives, read from the summary of `bpo bootstrap` or counted from the groups."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo.bootstrap.changes import ChangeLexicon
from bpo.bootstrap.completion_types import COMPLETION_TYPES
from bpo.bootstrap.job.statistics import SIMILARITY_BINS, SourceStatistics, percentile
from bpo.records import PreferenceGroup

# Changes are counted in a sample of at most this many groups, because counting costs as much as a diff.
COUNTED_GROUPS = 1000
LONGEST_COUNTED_WORDS = 2000  # comparing longer texts may take seconds
PERCENTS = (5, 50, 95)


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """Figures of one source of negatives.

    Attributes:
        name: A name in `bootstrap.sources`; without a summary, the type of the completions.
        type: Type of its completions in groups; empty if it is not a source of negatives.
        kept: Number of negatives kept; None if unknown.
        refused: Reason -> number of refused completions.
        words: 5th, 50th and 95th percentile of the number of words.
        similarity: Number of negatives that keep 0-10 %, 10-20 % ... of the longer text's words in place.
        kinds, added, dropped: Kind of change, object added, object dropped -> number of negatives.
    """

    name: str
    type: str = ""
    kept: int | None = None
    refused: Mapping[str, int] = field(default_factory=dict)
    words: tuple[int, ...] = ()
    similarity: tuple[int, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)


def read_summary(path: Path) -> list[SourceFigures]:
    """The sources in a `GROUPS.summary.json`; empty if the file does not exist.

    Raises:
        ValueError: The file has an unexpected format.
    """
    if not path.exists():
        return []
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        kept, refused, statistics = (_dict(tree.get(name)) for name in ("kept", "refused", "statistics"))
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; recreate it with bpo bootstrap") from error
    return [
        _figures(name, kept.get(name), refused.get(name), statistics.get(name))
        for name in dict.fromkeys((*kept, *statistics, *refused))
    ]


def _figures(name: str, kept: Any, refused: Any, statistics: Any) -> SourceFigures:
    statistics = _dict(statistics)
    words = _counts(statistics.get("words"))
    histogram = statistics.get("similarity_histogram")
    is_histogram = isinstance(histogram, list) and all(map(_is_count, histogram))
    return SourceFigures(
        name=name,
        type=COMPLETION_TYPES.get(name, ""),
        kept=kept if _is_count(kept) else None,
        refused=_counts(refused),
        words=tuple(words[f"p{percent}"] for percent in PERCENTS if f"p{percent}" in words),
        similarity=tuple(histogram) if is_histogram and len(histogram) == SIMILARITY_BINS else (),
        kinds=_counts(statistics.get("kinds_of_change")),
        added=_counts(statistics.get("objects_added")),
        dropped=_counts(statistics.get("objects_dropped")),
    )


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _counts(value: Any) -> dict[str, int]:
    return {name: count for name, count in _dict(value).items() if _is_count(count)}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


class Counting:
    """Counts types and lengths in all added groups, and changes in a sample of them.

    Args:
        changes: Whether to keep a sample for `sources`.
    """

    def __init__(self, changes: bool):
        self.words: dict[str, Counter[int]] = {}
        self._changes = changes
        self._draw = random.Random(0)
        self._num_groups = 0
        self._sample: list[PreferenceGroup] = []

    def add(self, group: PreferenceGroup) -> None:
        for completion in group.completions:
            self.words.setdefault(completion.type, Counter())[len(completion.response.split())] += 1
        self._num_groups += 1
        if not self._changes:
            return
        if len(self._sample) < COUNTED_GROUPS:
            self._sample.append(group)
        elif (place := self._draw.randrange(self._num_groups)) < COUNTED_GROUPS:
            self._sample[place] = group

    def lengths(self) -> dict[str, tuple[int, ...]]:
        """Type -> percentiles of the number of words, the most frequent type first."""
        types = sorted(self.words, key=lambda kind: (-self.words[kind].total(), kind))
        return {kind: tuple(percentile(self.words[kind], p) or 0 for p in PERCENTS) for kind in types}

    def sources(self, refused: Mapping[str, Mapping[str, int]], lexicon: ChangeLexicon) -> list[SourceFigures]:
        """Figures by completion type, relative to the group's best; `refused`: source -> reason -> completions."""
        counted: dict[str, SourceStatistics] = {}
        for group in self._sample:
            best = max(group.completions, key=lambda completion: completion.score)
            for completion in group.completions:
                longest = max(len(text.split()) for text in (best.response, completion.response))
                if completion.score < best.score and longest <= LONGEST_COUNTED_WORDS:
                    statistics = counted.setdefault(completion.type, SourceStatistics())
                    statistics.add(best.response, completion.response, lexicon)
        types = {COMPLETION_TYPES.get(source, source): source for source in refused}
        figures = []
        for kind in dict.fromkeys((*sorted(counted), *sorted(types))):
            changes = counted[kind].to_json() if kind in counted else {}
            kept = self.words[kind].total() if kind in self.words else None
            figures.append(_figures(kind, kept, refused.get(types.get(kind, "")), changes))
        return figures
