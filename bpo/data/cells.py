"""Cells: a completion scored under a view. Which cells of a group the terms of a loss need, and their pairs.

A view is the group's prompt with its images clean, changed or missing, or another prompt; see `bpo.data.views`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bpo.config.loss import ViewConfig
from bpo.data.encode import EncodedGroup, EncodedPrompt

CLEAN = ""
AUXILIARY = "auxiliary"
EXPLORED = "explored"


@dataclass(frozen=True, slots=True)
class Cell:
    """A completion under a view.

    completion: index among the group's completions, or among the view's own.
    argmax_of: if not None, the tokens scored are not the completion's, but the most likely ones under this other view
        at each position of the completion.
    """

    view: str
    completion: int
    argmax_of: str | None = None


@dataclass(frozen=True, slots=True)
class CellPair:
    """A preferred and a dispreferred cell; None is the constant 0 (an anchor).

    weight, beta: factors of the loss and of its inverse temperature.
    """

    chosen: Cell | None
    rejected: Cell | None
    weight: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True, slots=True)
class TermSpec:
    """What a term of the loss asks of the data; fields as in `TermConfig`.

    reference: whether the reference's log-probs of its cells are needed.
    """

    name: str = "sigmoid"
    pairs: str = "text"
    reference: bool = True
    beta: float = 1.0
    view: str = CLEAN
    against: str = CLEAN
    token_weights: str = ""
    ld_alpha: float = 1.0
    guidance_view: str | None = None
    shared_tokens: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weighs_tokens(self) -> bool:
        return bool(self.token_weights) or self.ld_alpha != 1


PairRule = Callable[[EncodedGroup, TermSpec], list[CellPair]]
PAIR_RULES: dict[str, PairRule] = {}


def register_pairs(name: str) -> Callable[[PairRule], PairRule]:
    """Registers a function from a group and a term to the pairs of its cells, under its `loss.terms[].pairs` name.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: PairRule) -> PairRule:
        if name in PAIR_RULES:
            raise ValueError(f"a rule for pairs named {name!r} is already registered")
        PAIR_RULES[name] = function
        return function

    return add


def preference_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with score_i > score_j, in order."""
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def group_pairs(group: EncodedGroup) -> list[CellPair]:
    """The preference pairs of a group on its clean images.

    Completions that describe another view, or are not `paired`, take no part.
    """
    count = len(group.completion_ids)
    weights, betas = group.weights or (1.0,) * count, group.betas or (1.0,) * count
    described, paired = group.described or (CLEAN,) * count, group.paired or (True,) * count
    return [
        CellPair(Cell(CLEAN, i), Cell(CLEAN, j), weights[i] * weights[j], betas[i] * betas[j])
        for i, j in preference_pairs(group.scores)
        if described[i] == described[j] == CLEAN and paired[i] and paired[j]
    ]


@register_pairs("text")
def text_pairs(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """A preferred against a dispreferred answer, under the same view."""
    return [
        replace(p, chosen=_under(p.chosen, term.view), rejected=_under(p.rejected, term.view))
        for p in group_pairs(group)
    ]


@register_pairs("image")
def image_pairs(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """The preferred answer under `view` against the same answer under `against`; mDPO, arXiv 2406.11839 eq. 6."""
    return [
        replace(p, chosen=_under(p.chosen, term.view), rejected=_under(p.chosen, term.against))
        for p in group_pairs(group)
    ]


@register_pairs("chosen")
def chosen_anchors(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """The preferred answer against 0."""
    return [replace(p, chosen=_under(p.chosen, term.view), rejected=None) for p in group_pairs(group)]


@register_pairs("rejected")
def rejected_anchors(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """0 against the dispreferred answer."""
    return [replace(p, chosen=None, rejected=_under(p.rejected, term.view)) for p in group_pairs(group)]


@register_pairs("other")
def other_anchors(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """An answer that describes the other image, under `against`, against 0. Together it counts as the group's pairs."""
    return [
        replace(p, chosen=Cell(term.against, k), rejected=None, weight=p.weight / len(others))
        for p in group_pairs(group)
        for others in [_describing_another(group)]
        for k in others
    ]


@register_pairs("symmetric")
def symmetric_pairs(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """Two images with an answer each, by turns: the right answer against the other's; SymMPO, arXiv 2506.11712."""
    pairs = []
    others = _describing_another(group)
    for p in group_pairs(group):
        assert p.chosen is not None
        for k in others:
            own, other = p.chosen.completion, replace(p, weight=p.weight / len(others))
            pairs.append(replace(other, chosen=Cell(term.view, own), rejected=Cell(term.view, k)))
            pairs.append(replace(other, chosen=Cell(term.against, k), rejected=Cell(term.against, own)))
    return pairs


@register_pairs("argmax")
def argmax_pairs(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """The preferred answer against the most likely tokens under `against`; POVID's second stage, arXiv 2402.11411."""
    return [
        replace(
            p,
            chosen=_under(p.chosen, term.view),
            rejected=replace(_under(p.chosen, term.view), argmax_of=term.against),
        )
        for p in group_pairs(group)
    ]


@register_pairs("auxiliary")
def auxiliary_anchors(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """The answers to the group's auxiliary prompts against 0. Together they count as the group's pairs."""
    answers = [len(view.completion_ids) for view in group.views if view.name.startswith(AUXILIARY)]
    total = sum(pair.weight for pair in group_pairs(group))
    return [CellPair(Cell(f"{AUXILIARY}{k}", 0), None, total / len(answers)) for k in range(len(answers))]


@register_pairs("explored")
def explored_anchors(group: EncodedGroup, term: TermSpec) -> list[CellPair]:
    """The explored answers against 0. Together they count as the group's pairs; a group without any has none.

    SELM's term is on the answer of the reference itself, in pairs or not: arXiv 2405.19332.
    """
    answers = [k for k, is_explored in enumerate(group.explored) if is_explored]
    total = sum(pair.weight for pair in group_pairs(group))
    betas = group.betas or (1.0,) * len(group.completion_ids)
    return [CellPair(Cell(term.view, k), None, total / len(answers), betas[k]) for k in answers]


def _under(cell: Cell | None, view: str) -> Cell:
    assert cell is not None
    return Cell(view, cell.completion)


def _describing_another(group: EncodedGroup) -> list[int]:
    return [index for index, view in enumerate(group.described) if view != CLEAN]


def merged(pairs: Sequence[CellPair]) -> list[CellPair]:
    """Equal pairs once, with the sum of their weights, in the order of their first occurrence."""
    weight_of: dict[CellPair, float] = {}
    for pair in pairs:
        key = replace(pair, weight=0.0)
        weight_of[key] = weight_of.get(key, 0.0) + pair.weight
    return [replace(pair, weight=weight) for pair, weight in weight_of.items()]


@dataclass(frozen=True, slots=True)
class GroupCells:
    """The cells of a group in packing order, and the pairs of each term.

    packed: cells that are packed: (view, completions), a prefix with the completions behind it.
    virtual: cells that share the rows of packed ones and are scored on other tokens (`Cell.argmax_of`).
    pairs: of each term.
    reference: cells that the reference must score.
    """

    packed: tuple[tuple[str, tuple[int, ...]], ...]
    virtual: tuple[Cell, ...]
    pairs: tuple[tuple[CellPair, ...], ...]
    reference: frozenset[Cell]

    def cells(self) -> list[Cell]:
        """Every cell, packed ones first."""
        return [Cell(view, k) for view, completions in self.packed for k in completions] + list(self.virtual)


@dataclass(frozen=True, slots=True)
class CellPlan:
    """The terms of a loss and the views that they name.

    for_reference: whether only what the reference must score is packed.
    every_completion: whether completions on the clean images are packed even if they are in no pair.
    identity: of the plug-in that registered rules or views; part of fingerprints.
    """

    terms: tuple[TermSpec, ...] = (TermSpec(),)
    views: Mapping[str, ViewConfig] = field(default_factory=dict)
    seed: int = 0
    for_reference: bool = False
    every_completion: bool = False
    identity: str = ""

    def reference_pass(self) -> CellPlan:
        return replace(self, for_reference=True)

    @property
    def view_names(self) -> tuple[str, ...]:
        """Changed views that some term uses, in the order of `views`."""
        used = {name for term in self.terms for name in _views_of(term)}
        return tuple(name for name in self.views if name in used)

    @property
    def needs_reference(self) -> bool:
        return any(term.reference for term in self.terms)

    @property
    def uses_auxiliary(self) -> bool:
        return any(term.pairs == AUXILIARY for term in self.terms)

    @property
    def uses_explored(self) -> bool:
        return any(term.pairs == EXPLORED for term in self.terms)

    def cells(self, group: EncodedGroup) -> GroupCells:
        """Selects the cells of an encoded group; those that no term needs are not computed."""
        pairs = tuple(tuple(merged(PAIR_RULES[term.pairs](group, term))) for term in self.terms)
        needed = {Cell(CLEAN, k) for k in range(len(group.completion_ids))} if self.every_completion else set()
        reference: set[Cell] = set()
        for term, of_term in zip(self.terms, pairs, strict=True):
            sides = {cell for pair in of_term for cell in (pair.chosen, pair.rejected) if cell is not None}
            if term.reference:
                reference |= sides
            if self.for_reference and not term.reference:
                continue
            needed |= sides
            if term.guidance_view is not None and not self.for_reference:
                needed |= {replace(cell, view=term.guidance_view) for cell in sides}
            if not term.shared_tokens or self.for_reference:
                needed |= {Cell(cell.argmax_of, cell.completion) for cell in sides if cell.argmax_of is not None}
        virtual = sorted(
            (cell for cell in needed if cell.argmax_of is not None),
            key=lambda cell: (cell.view, cell.argmax_of or "", cell.completion),
        )
        needed |= {replace(cell, argmax_of=None) for cell in virtual}
        names = [CLEAN, *(view.name for view in group.views)]
        packed = []
        for name in names:
            completions = tuple(sorted(c.completion for c in needed if c.view == name and c.argmax_of is None))
            if completions:
                packed.append((name, completions))
        return GroupCells(tuple(packed), tuple(virtual), pairs, frozenset(reference))


def _views_of(term: TermSpec) -> set[str]:
    return {term.view, term.against, term.guidance_view or CLEAN}


def view_of(group: EncodedGroup, name: str) -> tuple[EncodedPrompt, tuple[tuple[int, ...], ...]]:
    """The prompt of a view and the completions to which its cells refer."""
    if name == CLEAN:
        return group.prompt, group.completion_ids
    view = next(view for view in group.views if view.name == name)
    return view.prompt, view.completion_ids or group.completion_ids


def packed_members(group: EncodedGroup, cells: GroupCells) -> list[EncodedGroup]:
    """The packed cells as groups of one view: a prefix with the token ids of its completions."""
    members = []
    for name, completions in cells.packed:
        prompt, ids = view_of(group, name)
        members.append(EncodedGroup(prompt, tuple(ids[k] for k in completions), (0.0,) * len(completions)))
    return members


def completion_ids(group: EncodedGroup, cell: Cell) -> tuple[int, ...]:
    return view_of(group, cell.view)[1][cell.completion]
