"""Samples of groups files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from bpo.tools.groups import sample
from tests.tools.view.sample_page import group


def test_a_sample_holds_no_more_than_it_gives() -> None:
    alive: Counter[int] = Counter()
    most = 0

    class Tracked:
        def __init__(self) -> None:
            nonlocal most
            alive[0] += 1
            most = max(most, alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    def many() -> Iterator[Any]:
        for _ in range(5000):
            yield Tracked()

    assert len(list(sample(many(), 10))) == 10
    assert most <= 13


def test_every_group_is_as_likely_in_a_sample() -> None:
    groups = [group(n, "A dog.", {"llm-hal": "A cat."}) for n in range(400)]
    drawn = [int(kept.id[1:]) for kept in sample(groups, 100)]
    assert drawn == sorted(set(drawn)) and len(drawn) == 100
    assert 150 < sum(drawn) / 100 < 250
