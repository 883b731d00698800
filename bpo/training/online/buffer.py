"""Negatives that the policy has made, in a replay buffer: the latest ones, drawn with odds that fall with each draw."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bpo.data.groups import MeasuredGroup


@dataclass(frozen=True, slots=True)
class Negative:
    """A negative of an annotation.

    Attributes:
        record: Index of the annotation.
        step: The step for which it was made, from 1.
        measured: Of the group of annotation and negative.
    """

    record: int
    step: int
    response: str
    measured: MeasuredGroup

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Negative:
        return cls(**{**entry, "measured": MeasuredGroup(**entry["measured"])})


class ReplayBuffer:
    """First in, first out, of `size` negatives (SAPO, arXiv 2405.20830).

    Attributes:
        entries: [negative, times drawn], oldest first.
    """

    def __init__(self, size: int, entries: Iterable[list[Any]] = ()):
        self.size, self.entries = size, list(entries)

    def append(self, negatives: Iterable[Negative]) -> None:
        """Adds negatives; the oldest make room."""
        self.entries = [*self.entries, *([negative, 0] for negative in negatives)][-self.size :]

    def draw(self, count: int, seed: int) -> list[Negative]:
        """Draws with replacement, with odds 1 / (1 + times drawn before this call)."""
        odds = [1 / (1 + times) for _, times in self.entries]
        drawn = random.Random(seed).choices(self.entries, odds, k=count)
        for entry in drawn:
            entry[1] += 1
        return [negative for negative, _ in drawn]

    def remove(self, records: set[int]) -> None:
        """Removes the negatives of these annotations."""
        self.entries = [entry for entry in self.entries if entry[0].record not in records]
