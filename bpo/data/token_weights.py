"""Weights of the tokens of a pair's sides, by rule.

A weight depends on the pair: the same answer may have other changed tokens against another one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpo.data.cells import AUXILIARY, CellPair, TermSpec, completion_ids
from bpo.data.encode import EncodedGroup


@dataclass(frozen=True, slots=True)
class WeighedSide:
    """What a rule that weighs tokens may read.

    ids: token ids of this side.
    other_ids: of the other side; None if that is an anchor.
    is_chosen: whether this is the preferred side.
    data: weights of the tokens in the data.
    """

    ids: Sequence[int]
    other_ids: Sequence[int] | None
    is_chosen: bool
    data: Sequence[float]


TokenRule = Callable[[WeighedSide, Mapping[str, Any]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class TokenRuleDefinition:
    """A registered rule and its options with their defaults."""

    function: TokenRule
    options: Mapping[str, Any]


TOKEN_RULES: dict[str, TokenRuleDefinition] = {}


def register_token_weights(name: str, options: Mapping[str, Any] | None = None) -> Callable[[TokenRule], TokenRule]:
    """Registers a function from a side and the term's options to a weight per token, as `loss.terms[].token_weights`.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: TokenRule) -> TokenRule:
        if name in TOKEN_RULES:
            raise ValueError(f"a rule for token weights named {name!r} is already registered")
        TOKEN_RULES[name] = TokenRuleDefinition(function, dict(options or {}))
        return function

    return add


@register_token_weights("data")
def data_weights(side: WeighedSide, options: Mapping[str, Any]) -> Sequence[float]:
    """The weights that the data give to spans of the answer."""
    return side.data


@register_token_weights("changed", {"gamma": 5.0, "smallest_match": 1})
def changed_weights(side: WeighedSide, options: Mapping[str, Any]) -> Sequence[float]:
    """gamma for tokens that the other side lacks, 1 for those that both have in the same order.

    RLHF-V's dense DPO, arXiv 2312.00849 eq. 3: gamma 5 and, with `length: mean`, N = sum of the weights. Runs of fewer
    than `smallest_match` equal tokens count as changed.
    """
    if side.other_ids is None:
        return [1.0] * len(side.ids)
    weights = [float(options["gamma"])] * len(side.ids)
    matcher = difflib.SequenceMatcher(None, side.ids, side.other_ids, autojunk=False)
    for block in matcher.get_matching_blocks():
        if block.size >= options["smallest_match"]:
            weights[block.a : block.a + block.size] = [1.0] * block.size
    return weights


def side_weights(group: EncodedGroup, pair: CellPair, term: TermSpec) -> tuple[np.ndarray, np.ndarray]:
    """The weights (fp64) of the tokens of both sides of a pair; none for an anchor."""
    ids = [None if cell is None else completion_ids(group, cell) for cell in (pair.chosen, pair.rejected)]
    shared = min(len(side) for side in ids if side is not None)
    both = []
    for k, (cell, own, other) in enumerate(zip((pair.chosen, pair.rejected), ids, reversed(ids), strict=True)):
        weights = np.empty(0)
        if cell is not None and own is not None:
            of_group = group.token_weights and not cell.view.startswith(AUXILIARY)
            data = group.token_weights[cell.completion] if of_group else (1.0,) * len(own)
            weights = np.ones(len(own))
            if term.token_weights:
                rule = TOKEN_RULES[term.token_weights].function
                weights = np.array(rule(WeighedSide(own, other, k == 0, data), term.options), dtype=np.float64)
                if len(weights) != len(own):
                    raise ValueError(
                        f"the rule {term.token_weights!r} gave {len(weights)} weights for {len(own)} tokens"
                    )
            # LD-DPO, arXiv 2409.06411 eq. 7: tokens beyond the shorter side's length count less.
            weights[shared:] *= term.ld_alpha
        both.append(weights)
    return both[0], both[1]
