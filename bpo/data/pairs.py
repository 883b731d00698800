"""Numbers the cells of a batch and writes the pairs of its terms as tensors.

Shape letters: N tokens of all cells, K cells, P pairs of all terms, E tokens of sides with weights, M second targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bpo.data.cells import Cell, CellPlan, GroupCells, completion_ids
from bpo.data.encode import EncodedGroup
from bpo.data.token_weights import side_weights
from bpo.records import LossInputs, SecondTargets, WeighedTokens

ANCHOR = -1


class _Numbering:
    """Indices of the cells of a batch: packed cells of all groups, then virtual ones; offsets of their tokens."""

    def __init__(self, groups: Sequence[EncodedGroup], cells: Sequence[GroupCells]):
        packed = [(g, cell) for g, of_group in enumerate(cells) for cell in of_group.cells() if cell.argmax_of is None]
        virtual = [(g, cell) for g, of_group in enumerate(cells) for cell in of_group.virtual]
        self.cells = [*packed, *virtual]
        self.index = {key: number for number, key in enumerate(self.cells)}
        self.lengths = [len(completion_ids(groups[g], cell)) for g, cell in self.cells]
        self.starts = [0, *itertools.accumulate(self.lengths)]
        self.virtual = virtual

    def of(self, group: int, cell: Cell | None) -> int:
        return ANCHOR if cell is None else self.index[group, cell]

    def tokens(self, group: int, cell: Cell) -> np.ndarray:
        number = self.index[group, cell]
        return np.arange(self.starts[number], self.starts[number + 1])


def loss_inputs(
    groups: Sequence[EncodedGroup], cells: Sequence[GroupCells], plan: CellPlan, *, is_filler: bool
) -> tuple[LossInputs, tuple[int, ...]]:
    """The loss inputs of packed groups without a reference, and the index of each cell's group.

    The tokens of packed cells stand in the order of the row, those of virtual cells behind them.
    """
    numbering = _Numbering(groups, cells)
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    betas: list[float] = []
    owners: list[int] = []
    guidance: list[tuple[int, int]] = []
    counts = []
    weighed = _Weighed()
    # A reference pass scores cells and has no loss.
    terms = [] if plan.for_reference else list(plan.terms)
    for number, term in enumerate(terms):
        before = len(pairs)
        for g, of_group in enumerate(cells):
            for pair in of_group.pairs[number]:
                sides = (pair.chosen, pair.rejected)
                if term.weighs_tokens:
                    for side, own in enumerate(side_weights(groups[g], pair, term)):
                        cell = sides[side]
                        if cell is not None:
                            weighed.add(numbering.tokens(g, cell), 2 * len(pairs) + side, own)
                pairs.append((numbering.of(g, pair.chosen), numbering.of(g, pair.rejected)))
                weights.append(0.0 if is_filler else pair.weight)
                betas.append(term.beta * pair.beta)
                owners.append(g)
                view = term.guidance_view
                guides = [None if c is None or view is None else replace(c, view=view) for c in sides]
                guidance.append((numbering.of(g, guides[0]), numbering.of(g, guides[1])))
        counts.append(len(pairs) - before)
        weighed.end_term()
    guided = any(term.guidance_view is not None for term in terms)
    has_reference = [cell in cells[g].reference for g, cell in numbering.cells]
    inputs = LossInputs(
        completion_of_token_N=torch.repeat_interleave(
            torch.arange(len(numbering.cells)), torch.tensor(numbering.lengths, dtype=torch.long)
        ),
        completion_starts_K1=torch.tensor(numbering.starts, dtype=torch.long),
        pairs_P2=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        pair_weight_P=torch.tensor(weights, dtype=torch.float32),
        pair_beta_P=torch.tensor(betas, dtype=torch.float32),
        pairs_of_term=tuple(counts),
        group_of_pair=tuple(owners),
        guidance_P2=torch.tensor(guidance, dtype=torch.long).reshape(-1, 2) if guided else None,
        weighed=weighed.tensors(),
        second=_second_targets(numbering),
        has_reference_N=None if all(has_reference) else _by_token(has_reference, numbering.lengths),
    )
    return inputs, tuple(g for g, _ in numbering.cells)


class _Weighed:
    """Collects the weighed tokens of the pairs' sides."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.sides: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.count = 0
        self.ends: list[int] = [0]

    def end_term(self) -> None:
        self.ends.append(self.count)

    def add(self, tokens: np.ndarray, side: int, weights: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.sides.append(np.full(len(tokens), side))
        self.weights.append(weights)
        self.count += len(tokens)

    def tensors(self) -> WeighedTokens | None:
        if not self.count:
            return None
        token_E, side_E, weight_E = (
            torch.from_numpy(np.concatenate(pieces)) for pieces in (self.tokens, self.sides, self.weights)
        )
        counts = tuple(end - start for start, end in itertools.pairwise(self.ends))
        return WeighedTokens(token_E, side_E, weight_E.float(), counts)


def _second_targets(numbering: _Numbering) -> SecondTargets | None:
    if not numbering.virtual:
        return None
    base: list[np.ndarray] = []
    source: list[np.ndarray] = []
    for g, cell in numbering.virtual:
        assert cell.argmax_of is not None
        own = replace(cell, argmax_of=None)
        base.append(numbering.tokens(g, own))
        other = replace(own, view=cell.argmax_of)
        # Without rows of the other view the tokens come from the reference (`shared_tokens`).
        source.append(numbering.tokens(g, other if (g, other) in numbering.index else own))
    return SecondTargets(*(torch.from_numpy(np.concatenate(pieces)) for pieces in (base, source)))


def _by_token(of_cell: Sequence[bool], lengths: Sequence[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(of_cell), torch.tensor(lengths, dtype=torch.long))
