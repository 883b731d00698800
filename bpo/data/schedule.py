"""Which groups form which optimizer step, micro-batch and rank; from lengths and the seed alone.

The content of a step does not depend on the number of ranks: only its division among them does.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Bins within this factor of their mean are level; a swap is looked for among so many of the emptiest bins.
_LEVEL_ENOUGH = 1.001
_SWAP_PARTNERS = 16


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One optimizer step: `micro_batches[rank][k]` are group indices; every rank has the same number of them.

    A rank that has no groups left gets a group of another rank with `is_filler` set: it computes (so that ZeRO's
    collectives match) and counts nothing.
    """

    index: int
    epoch: int
    groups: tuple[int, ...]
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    is_filler: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class PlanBalance:
    """By what share the busiest rank carries more tokens than the mean of the ranks: the others wait that long.

    `*_mean` is over the whole plan; `*_largest` leaves out steps of fewer groups than the first, such as the last of an
    epoch, which cannot be level. Of micro-batches the k-th of all ranks are compared: ZeRO-3 synchronises in layers.
    """

    step_mean: float
    step_largest: float
    micro_batch_mean: float
    micro_batch_largest: float


def epoch_order(num_groups: int, seed: int, epoch: int) -> list[int]:
    """The order of the groups in an epoch: a shuffle seeded by (seed, epoch)."""
    order = list(range(num_groups))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def split_into_micro_batches(
    groups: Sequence[int],
    num_tokens: Sequence[int],
    world_size: int,
    max_tokens: int,
    *,
    level: bool = True,
    row_tokens: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Divides groups among `world_size` ranks, every rank with the same number of micro-batches.

    Longest group first into the emptiest bin (LPT): deterministic, and within 4/3 of the best balance; then, with
    `level`, swaps between bins until they are within 0.1 % of their mean or no swap helps: with eight groups a rank
    they are, with four some per cent may remain. A group above `max_tokens` gets a bin of its own.

    Args:
        groups: Indices into `num_tokens`.
        num_tokens: Tokens of each group through the language model.
        world_size: Ranks.
        max_tokens: Largest micro-batch, in tokens.
        level: Swap groups between bins.
        row_tokens: For groups that are padded rows: the length of each group's rows, so that a group has
            `num_tokens / row_tokens` of them. In a bin all rows are padded to the longest, and that is what must fit.

    Returns:
        `[rank][micro-batch]` lists of group indices; a bin may be empty when there are fewer groups than bins.
    """
    # A group above the limit fills one bin and no more: counted in full it would ask for bins that only fillers take.
    total = sum(min(num_tokens[g], max_tokens) for g in groups)
    longest_first = sorted(groups, key=lambda g: (-num_tokens[g], g))
    per_rank = max(1, math.ceil(total / (max_tokens * world_size)))
    while True:
        num_bins = per_rank * world_size
        heap = [(0, b) for b in range(num_bins)]
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        for group in longest_first:
            filled, b = heapq.heappop(heap)
            bins[b].append(group)
            heapq.heappush(heap, (filled + num_tokens[group], b))
        if _fit(bins, num_tokens, max_tokens, row_tokens):
            break
        per_rank += 1 + per_rank // 128  # of very many bins some stay free, and each try takes as long as the first
    if level and world_size > 1:
        levelled = _level([list(one) for one in bins], num_tokens, max_tokens)
        bins = levelled if _fit(levelled, num_tokens, max_tokens, row_tokens) else bins
        bins = _snake(bins, num_tokens, world_size)
    # Bin b goes to rank b % world, so that the k-th micro-batches of the ranks run side by side; order inside a bin is
    # that of the step, whatever LPT did.
    place_of = {group: i for i, group in enumerate(groups)}
    for one in bins:
        one.sort(key=place_of.__getitem__)
    return [[bins[k * world_size + rank] for k in range(per_rank)] for rank in range(world_size)]


def _fit(
    bins: Sequence[Sequence[int]], num_tokens: Sequence[int], max_tokens: int, row_tokens: Sequence[int] | None
) -> bool:
    """Whether every bin of more than one group is within `max_tokens`, padding included."""
    several = [one for one in bins if len(one) > 1]
    if row_tokens is None:
        return all(sum(num_tokens[g] for g in one) <= max_tokens for one in several)
    return all(
        sum(num_tokens[g] // row_tokens[g] for g in one) * max(row_tokens[g] for g in one) <= max_tokens
        for one in several
    )


def _level(bins: list[list[int]], num_tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Swaps groups between the fullest bin and others while that makes the fuller of the two less full.

    LPT leaves some per cent between bins of few groups, and every rank waits for the fullest in every layer.
    """
    filled = [sum(num_tokens[g] for g in one) for one in bins]
    enough = _LEVEL_ENOUGH * sum(filled) / len(filled)
    for _ in range(4 * len(bins)):
        fullest = max(range(len(bins)), key=lambda b: (filled[b], -b))
        if filled[fullest] <= enough:
            break
        best: tuple[int, int, int, int | None] | None = None
        for other in heapq.nsmallest(_SWAP_PARTNERS, range(len(bins)), key=lambda b: (filled[b], b)):
            gap = filled[fullest] - filled[other]
            if gap < 2:
                continue
            for out in bins[fullest]:
                for back in (*bins[other], None):
                    moved = num_tokens[out] - (0 if back is None else num_tokens[back])
                    if not 0 < moved < gap or filled[other] + moved > max_tokens:
                        continue
                    fuller = max(filled[fullest] - moved, filled[other] + moved)
                    if best is None or fuller < best[0]:
                        best = (fuller, other, out, back)
        if best is None or best[0] >= filled[fullest]:
            break
        _, other, out, back = best
        bins[fullest].remove(out)
        bins[other].append(out)
        if back is not None:
            bins[other].remove(back)
            bins[fullest].append(back)
        moved = num_tokens[out] - (0 if back is None else num_tokens[back])
        filled[fullest] -= moved
        filled[other] += moved
    return bins


def _snake(bins: list[list[int]], num_tokens: Sequence[int], world_size: int) -> list[list[int]]:
    """Orders bins by size, so that the k-th of all ranks are alike, every second row of ranks the other way round."""
    order = sorted(bins, key=lambda one: (-sum(num_tokens[g] for g in one), one))
    rows = [order[start : start + world_size] for start in range(0, len(order), world_size)]
    return [one for k, row in enumerate(rows) for one in (row if k % 2 == 0 else row[::-1])]


def plan_steps(
    num_tokens: Sequence[int],
    *,
    groups_per_step: int,
    epochs: int,
    seed: int,
    world_size: int,
    max_tokens: int,
    max_steps: int = 0,
    row_tokens: Sequence[int] | None = None,
) -> list[PlannedStep]:
    """The whole run: shuffled epochs cut into steps of `groups_per_step` groups, the last of an epoch may be smaller.

    `row_tokens` as in `split_into_micro_batches`.

    Raises:
        ValueError: there is nothing to train on.
    """
    if not num_tokens:
        raise ValueError("there are no groups to plan: every group was dropped or the file is empty")
    steps: list[PlannedStep] = []
    for epoch in range(epochs):
        order = epoch_order(len(num_tokens), seed, epoch)
        for start in range(0, len(order), groups_per_step):
            if max_steps and len(steps) == max_steps:
                return steps
            groups = order[start : start + groups_per_step]
            bins = split_into_micro_batches(groups, num_tokens, world_size, max_tokens, row_tokens=row_tokens)
            steps.append(_planned_step(len(steps), epoch, groups, num_tokens, bins))
    return steps


def _planned_step(
    index: int, epoch: int, groups: list[int], num_tokens: Sequence[int], bins: list[list[list[int]]]
) -> PlannedStep:
    shortest = min(groups, key=lambda g: (num_tokens[g], g))
    filler = tuple(tuple(not one for one in rank) for rank in bins)
    micro = tuple(tuple(tuple(one) if one else (shortest,) for one in rank) for rank in bins)
    return PlannedStep(index, epoch, tuple(groups), micro, filler)


def plan_balance(steps: Sequence[PlannedStep], num_tokens: Sequence[int]) -> PlanBalance:
    """How level a plan is; fillers count, for they take their time."""
    steps_excess, micro_excess = _Excess(), _Excess()
    for step in steps:
        is_whole = len(step.groups) == len(steps[0].groups)
        tokens = [[sum(num_tokens[g] for g in one) for one in rank] for rank in step.micro_batches]
        steps_excess.add([sum(rank) for rank in tokens], is_whole)
        for side_by_side in zip(*tokens, strict=True):
            micro_excess.add(side_by_side, is_whole)
    return PlanBalance(steps_excess.mean, steps_excess.largest, micro_excess.mean, micro_excess.largest)


class _Excess:
    """Tokens of the busiest rank above the mean, over all steps (weighted by tokens) and at most."""

    def __init__(self) -> None:
        self.busiest = self.total = self.largest = 0.0

    def add(self, tokens_of_ranks: Sequence[int], is_whole: bool) -> None:
        mean = sum(tokens_of_ranks) / len(tokens_of_ranks)
        self.busiest += max(tokens_of_ranks)
        self.total += mean
        if is_whole:
            self.largest = max(self.largest, max(tokens_of_ranks) / mean - 1)

    @property
    def mean(self) -> float:
        return self.busiest / self.total - 1
