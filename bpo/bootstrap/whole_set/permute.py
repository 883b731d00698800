"""Seeded permutations with low cost: which record takes the text of which.

Every step exchanges texts between records, so each text stays in use exactly once. The cost is lowered in blocks of
records that are near each other in one of several orders; optimality is not needed.

Shape letters: R rows (records that take a text), C columns (texts), N items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bpo.bootstrap.whole_set.items import FORBIDDEN, Items
from bpo.job.seeds import derive_seed

Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]
Order = Callable[[int], tuple[np.ndarray, ...]]

# More than an exchange of two texts can gain by ending two forbidden pairs.
_OTHER_KEY = 4 * FORBIDDEN
_REPAIR_ROUNDS = 4
# Records with which the owner of a forbidden text tries to exchange it before it leaves the permutation.
_EXCHANGES = 4
_HASHES_PER_ORDER = 3
# Costs are multiples of 1/16: sums of two up to `_OTHER_KEY` fit into the 24 bits of float32.
_STEPS = np.float32(16)


@dataclass(frozen=True, slots=True)
class Search:
    """How to look for partners.

    Attributes:
        cost: (rows, columns) -> [R, C] float32, `FORBIDDEN` or more for pairs that must not be made.
        fits: (row, column) -> whether a pair whose cost allows it is allowed, by checks that take longer.
        order: Round -> sort keys of all items, each [N], the most significant first; near items should be adjacent.
        tie: [N] uint64, random numbers that depend on seed and record only; the order in repair rounds.
        rounds: Number of orders to try.
        block_size: Number of records that exchange texts at a time.
    """

    cost: Cost
    fits: Callable[[int, int], bool]
    order: Order
    tie: np.ndarray
    rounds: int
    block_size: int


def near_content(items: Items, seed: int) -> Order:
    """Orders in which items with the same content are likely to be adjacent."""

    def order(number: int) -> tuple[np.ndarray, ...]:
        return tuple(items.minhash(derive_seed(seed, number, index)) for index in range(_HASHES_PER_ORDER))

    return order


def permute(items: np.ndarray, key: np.ndarray, search: Search) -> np.ndarray:
    """Chooses for each item the item whose text it takes.

    Args:
        items: Items that take part, ascending.
        key: [N] uint64; only items with equal keys exchange texts.

    Returns:
        [N]: a permutation of the items that could be matched, without a forbidden pair; -1 for all others.
    """
    partner = np.arange(len(key))
    bad = np.zeros(len(key), dtype=bool)
    bad[items] = True
    for number in range(search.rounds):
        keys = [key[items], *(each[items] for each in search.order(number)), search.tie[items]]
        # Shifted by half a block every other time, as the end of a block separates neighbours.
        _exchange(items[np.lexsort(keys[::-1])], partner, bad, key, search, shift=number % 2)
    for number in range(_REPAIR_ROUNDS):
        if not bad.any():
            break
        # In a random order, equal texts, which cannot be exchanged, are not next to each other.
        ordered = items[np.lexsort((rehashed(search.tie[items], number), key[items]))]
        chosen = bad[ordered] | np.roll(bad[ordered], 1)
        before = int(bad.sum())
        _exchange(ordered[chosen], partner, bad, key, search, shift=0)
        if int(bad.sum()) == before and number:
            break
    bad[items] = [bad[i] or not search.fits(int(i), int(partner[i])) for i in items]
    return _without_bad(items, partner, bad, key, search)


def _exchange(
    ordered: np.ndarray, partner: np.ndarray, bad: np.ndarray, key: np.ndarray, search: Search, shift: int
) -> None:
    """Exchanges the texts within each block of records; changes `partner` and `bad`."""
    if not len(ordered):
        return
    start = -shift * (search.block_size // 2)
    for first in range(start, len(ordered), search.block_size):
        rows = ordered[max(first, 0) : first + search.block_size]
        columns = partner[rows]
        cost = search.cost(rows, columns)
        cost[key[rows][:, None] != key[columns][None, :]] = _OTHER_KEY
        chosen = exchange(cost)
        partner[rows] = columns[chosen]
        bad[rows] = cost[np.arange(len(rows)), chosen] >= FORBIDDEN


def exchange(cost: np.ndarray) -> np.ndarray:
    """For each row a column, a permutation: from the diagonal, exchanges of two columns until none lowers the cost."""
    rows = np.arange(len(cost))
    chosen = rows.copy()
    # Sums are exact: otherwise an exchange and its reverse could both seem to gain by rounding, without end.
    cost = np.rint(cost * _STEPS) / _STEPS
    current = cost.copy()  # [row, k]: the cost of row with the column of row k
    while True:
        own = current.diagonal()
        gain = own[:, None] + own[None, :] - current - current.T
        best = gain.argmax(axis=1)
        gains = gain[rows, best]
        # Pairs that are each other's best have no row in common, so all their exchanges can be made at once.
        mutual = (best[best] == rows) & (gains > 0) & (rows < best)
        if not mutual.any():
            return chosen
        first, second = rows[mutual], best[mutual]
        chosen[first], chosen[second] = chosen[second], chosen[first]
        current = cost[:, chosen]


def _without_bad(
    items: np.ndarray, partner: np.ndarray, bad: np.ndarray, key: np.ndarray, search: Search
) -> np.ndarray:
    """Exchanges the forbidden texts with those of some others; what remains leaves the permutation.

    A record leaves it by leaving the text that it would take to the record that would take its own.
    """

    def fits(row: int, column: int) -> bool:
        allowed = row != column and search.cost(np.array([row]), np.array([column]))[0, 0] < FORBIDDEN
        return bool(allowed and search.fits(row, column))

    taker = np.empty_like(partner)
    taker[partner] = np.arange(len(partner))
    out = np.ones(len(partner), dtype=bool)
    out[items] = False
    ordered = items[np.lexsort((search.tie[items], key[items]))]
    place = {int(item): number for number, item in enumerate(ordered) if bad[item]}
    waiting = [item for item in place]
    while waiting:
        record = waiting.pop()
        following = int(partner[record])
        # The removal of others may have given it another text.
        if out[record] or fits(record, following):
            continue
        others = ordered[place.get(record, 0) + 1 :][:_EXCHANGES]
        others = others[(key[others] == key[record]) & ~out[others]]
        allowed = search.cost(np.array([record]), partner[others])[0] < FORBIDDEN if len(others) else ()
        for other in others[allowed]:
            theirs = int(partner[other])
            if fits(record, theirs) and fits(int(other), following):
                partner[record], partner[other], taker[theirs], taker[following] = theirs, following, record, other
                break
        else:
            # Either the owner of the forbidden text leaves, or the record itself.
            leaving = following if fits(record, int(partner[following])) else record
            previous, after = int(taker[leaving]), int(partner[leaving])
            out[leaving] = True
            partner[leaving], taker[leaving] = leaving, leaving
            if previous != leaving:
                partner[previous], taker[after] = after, previous
                waiting.append(previous)
    partner[out] = -1
    return partner


def rehashed(tie: np.ndarray, number: int) -> np.ndarray:
    """Another random order for each number (the finaliser of SplitMix64)."""
    mixed = tie + np.uint64((number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
