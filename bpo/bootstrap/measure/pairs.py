"""Preference pairs as texts, and samples of records that depend on seed and record id alone."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from bpo.records import Completion, PreferenceGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextPair:
    """The preferred and the rejected answer of one preference pair.

    Attributes:
        donor: Id of the record from whose annotation the rejected text was taken, if known.
        weight: Weight of the pair in the loss.
        images: Image paths of the record.
    """

    record_id: str
    preferred: str
    rejected: str
    donor: str | None = None
    weight: float = 1.0
    images: tuple[str, ...] = ()


def best_completion(group: PreferenceGroup) -> Completion:
    """The completion with the highest score that describes the group's images, the first of several."""
    return max(group.own_completions or group.completions, key=lambda completion: completion.score)


def typed_pairs(group: PreferenceGroup) -> Iterator[tuple[str, TextPair]]:
    """The best completion with each that has a lower score and another text, by the type of the rejected one."""
    best = best_completion(group)
    for completion in group.own_completions:
        if completion.score < best.score and completion.response.strip() != best.response.strip():
            provenance = completion.provenance
            yield (
                completion.type,
                TextPair(
                    record_id=group.id,
                    preferred=best.response,
                    rejected=completion.response,
                    donor=provenance.donor if provenance else None,
                    weight=completion.weight * best.weight,
                    images=group.images,
                ),
            )


def sample_rank(seed: int, record_id: str) -> int:
    """A uniform 64-bit number of the record; samples consist of the records with the lowest."""
    key = seed.to_bytes(8, "big")
    digest = hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big")


class Sample(Generic[T]):
    """The values of at most `size` items with the lowest ranks: the same for any order of the items.

    Attributes:
        num_seen: Number of items offered.
    """

    def __init__(self, size: int):
        self._size = size
        self._heap: list[tuple[int, str, int, T]] = []  # the highest rank, negated, is at the top
        self.num_seen = 0

    def accepts(self, rank: int) -> bool:
        """Whether an item of this rank may enter the sample."""
        return len(self._heap) < self._size or (bool(self._heap) and rank <= self.highest_rank)

    def add(self, rank: int, tie: str, value: T) -> None:
        """Offers an item; `tie` orders items of the same rank, those of the same tie keep their order."""
        self.num_seen += 1
        if self.accepts(rank):
            item = (-rank, tie, self.num_seen, value)
            if len(self._heap) < self._size:
                heapq.heappush(self._heap, item)
            else:
                heapq.heappushpop(self._heap, item)

    @property
    def highest_rank(self) -> int:
        """The highest rank kept; all items with a lower rank are in the sample."""
        return -self._heap[0][0] if self._heap else -1

    def items(self) -> list[tuple[str, T]]:
        """(tie, value) of each item, lowest rank first."""
        return [(tie, value) for _, tie, _, value in sorted(self._heap, key=lambda item: (-item[0], *item[1:3]))]

    def values(self) -> list[T]:
        """The values, lowest rank first."""
        return [value for _, value in self.items()]
