"""Folds of a cross-validation in which no text of a held-out pair is trained on.

Pairs are linked if they share a record, a donor or a text. Linked pairs go into the same fold, because a text that is
preferred in one record and rejected in another (`swap`) would be learned with the opposite label: plain folds by record
then give an accuracy far below 0.5 for texts that are perfectly balanced. A text that many records have in common, such
as "Yes.", is not a link: what is learned of it holds for the population.

The same happens one level below the texts if words are exchanged evenly (`edit`: each word is put in as often as it is
taken out): of a balanced word, any training set has seen the opposite of what is held out. If words are more even than
chance, the exchanges are therefore taken apart into cycles (dog -> cat, cat -> bus, bus -> dog), which are held out as
a whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bpo.bootstrap.measure.ngrams import tokens_of
from bpo.bootstrap.measure.pairs import TextPair

# Kind and name of what links pairs: ("text", "A dog."), ("record", "r1"), ("cycle", 3).
Link = tuple[str, str | int]

# A text of more records is not a link.
MAX_LINKED_RECORDS = 20

_ARTICLES = {"a", "an"}


@dataclass(frozen=True)
class Folds:
    """Assignment of pairs to folds.

    Attributes:
        fold_P: [P] int, fold in which each pair is held out.
        trains_PF: [P, F] bool, whether a pair is trained on when fold F is held out.
        is_cut: Whether linked pairs had to be put into different folds; pairs that share a text with the held-out
            ones are then left out of training.
    """

    fold_P: np.ndarray
    trains_PF: np.ndarray
    is_cut: bool


def make_folds(pairs: Sequence[TextPair], num_folds: int, exchanges: bool = False) -> Folds:
    """Puts linked pairs into the same fold, as far as the folds keep about the same size.

    A set of linked pairs that is larger than a fold is cut in an order that keeps linked pairs together: the
    permutation of a `swap` may be one long cycle, which becomes a few arcs with few texts at their ends.

    Args:
        exchanges: Also hold out cycles of exchanged words as a whole.
    """
    links = _links(pairs)
    if exchanges:
        for number, cycle in enumerate(exchange_cycles(pairs)):
            links["cycle", number] = cycle
    keys_of_pair: dict[int, list[Link]] = defaultdict(list)
    for key, members in links.items():
        for pair in members:
            keys_of_pair[pair].append(key)
    size = -(-len(pairs) // num_folds)
    pieces, is_cut = [], False
    for component in _components(len(pairs), links, keys_of_pair):
        is_cut = is_cut or len(component) > size
        pieces += [component[start : start + size] for start in range(0, len(component), size)]
    fold_P = np.zeros(len(pairs), dtype=np.int64)
    sizes = np.zeros(num_folds, dtype=np.int64)
    for piece in sorted(pieces, key=len, reverse=True):
        smallest = int(sizes.argmin())
        fold_P[piece] = smallest
        sizes[smallest] += len(piece)
    trains_PF = fold_P[:, None] != np.arange(num_folds)[None]
    if is_cut:
        for key, members in links.items():
            held_out = set(fold_P[members].tolist())
            if len(held_out) > 1 and key[0] != "cycle":
                trains_PF[np.ix_(members, sorted(held_out))] = False
    return Folds(fold_P, trains_PF, is_cut)


def exchange_cycles(pairs: Sequence[TextPair]) -> list[list[int]]:
    """Takes the exchanges of words apart into cycles in which each word is put in as often as it is taken out.

    A pair is an edge from the tokens that it takes out to those that it puts in; articles do not count. Each pair is in
    at most one cycle.
    """
    edges: dict[Hashable, list[tuple[int, Hashable]]] = defaultdict(list)
    for number in range(len(pairs) - 1, -1, -1):  # pop() then takes the lowest first
        before, after = (_content(text) for text in (pairs[number].preferred, pairs[number].rejected))
        gone, come = before - after, after - before
        if gone != come:
            edges[frozenset(gone.items())].append((number, frozenset(come.items())))
    cycles: list[list[int]] = []
    for start in list(edges):
        path: list[tuple[Hashable, int]] = []  # (node, edge that leaves it)
        place: dict[Hashable, int] = {}
        node = start
        while True:
            if node in place:
                first = place[node]
                cycles.append([edge for _, edge in path[first:]])
                for passed, _ in path[first:]:
                    del place[passed]
                del path[first:]
            if not edges.get(node):
                if not path:
                    break
                node, _ = path.pop()  # a dead end: its edge is in no cycle
                del place[node]
                continue
            edge, target = edges[node].pop()
            place[node] = len(path)
            path.append((node, edge))
            node = target
    return cycles


def _content(text: str) -> Counter[str]:
    return Counter(token for token in tokens_of(text) if token not in _ARTICLES)


def _links(pairs: Sequence[TextPair]) -> dict[Link, list[int]]:
    """Record, donor or text -> the pairs that it links."""
    links: dict[Link, list[int]] = defaultdict(list)
    records: dict[Link, set[str]] = defaultdict(set)
    for number, pair in enumerate(pairs):
        names = (pair.record_id,) if pair.donor is None else (pair.record_id, pair.donor)
        texts = (pair.preferred.strip(), pair.rejected.strip())
        keys: list[Link] = [*(("record", name) for name in names), *(("text", text) for text in texts)]
        for key in dict.fromkeys(keys):  # not a set, whose order depends on the hash seed
            links[key].append(number)
            records[key].add(pair.record_id)
    return {
        key: members
        for key, members in links.items()
        if len(members) > 1 and (key[0] == "record" or len(records[key]) <= MAX_LINKED_RECORDS)
    }


def _components(
    num_pairs: int, links: dict[Link, list[int]], keys_of_pair: dict[int, list[Link]]
) -> Iterator[list[int]]:
    """Connected pairs, breadth first."""
    seen = np.zeros(num_pairs, dtype=bool)
    done: set[Link] = set()
    for start in range(num_pairs):
        if seen[start]:
            continue
        seen[start] = True
        component = [start]
        for pair in component:  # grows
            for key in keys_of_pair.get(pair, ()):
                if key in done:
                    continue
                done.add(key)
                for other in links[key]:
                    if not seen[other]:
                        seen[other] = True
                        component.append(other)
        yield component
