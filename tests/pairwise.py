"""Pairwise test cases: a grid of options, thinned so that each pair of values of two options occurs in some case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any


def pairwise(**options: Sequence[Any]) -> tuple[str, list[tuple[Any, ...]]]:
    """Names and cases for `@pytest.mark.parametrize(*pairwise(dtype=DTYPES, trained=[True, False]), ids=str)`.

    Greedy and deterministic: each case starts from the first pair that is still missing; every other option takes the
    value that adds most missing pairs.
    """
    sizes = [len(values) for values in options.values()]
    columns = range(len(sizes))
    if len(sizes) < 2:
        raise ValueError(f"pairwise: {len(sizes)} options have no pairs; give two or more")
    missing = {
        ((a, i), (b, j)): None for a, b in combinations(columns, 2) for i in range(sizes[a]) for j in range(sizes[b])
    }
    cases = []
    while missing:
        case: dict[int, int] = dict(next(iter(missing)))
        for column in columns:
            if column not in case:
                gains = [
                    sum(tuple(sorted([(column, value), other])) in missing for other in case.items())
                    for value in range(sizes[column])
                ]
                case[column] = gains.index(max(gains))
        for pair in combinations(sorted(case.items()), 2):
            missing.pop(pair, None)
        cases.append(tuple(values[case[column]] for column, values in enumerate(options.values())))
    return ",".join(options), cases
