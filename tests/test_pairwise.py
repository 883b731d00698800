"""Thinned grids keep every pair of values."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairwise import pairwise

GRIDS = [
    {"a": "xy", "b": [1, 2, 3]},
    {"dtype": "fbh", "trained": [True, False], "capped": [False, True], "chunks": [None, 2], "mode": "srf", "n": "123"},
    {"a": "x", "b": [1], "c": range(7), "d": range(5)},
]


@pytest.mark.parametrize("options", GRIDS)
def test_every_pair_of_values_occurs(options):
    names, cases = pairwise(**options)
    assert names.split(",") == list(options)
    for (i, first), (j, second) in combinations(enumerate(options.values()), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(first, second))


def test_a_grid_of_216_becomes_a_dozen_cases_the_same_each_time():
    _, cases = pairwise(**GRIDS[1])
    assert len(cases) <= 13 and len(set(cases)) == len(cases)
    assert pairwise(**GRIDS[1])[1] == cases


def test_one_option_has_no_pairs():
    with pytest.raises(ValueError, match="1 options have no pairs"):
        pairwise(a="xy")
