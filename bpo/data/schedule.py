"""Schedule: assigns groups to optimizer steps, ranks and micro-batches. Depends only on lengths and the seed.

The content of a step does not depend on the number of ranks, only its division among them.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Bins within this factor of their mean are balanced; swaps are searched among this many of the emptiest bins.
_LEVEL_ENOUGH = 1.001
_SWAP_PARTNERS = 16


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One optimizer step. `micro_batches[rank][k]` are group indices; all ranks have equally many micro-batches.

    A rank without groups left gets a group of another rank with `is_filler` set: it is computed, so that ZeRO's
    collectives match, but has no weight.
    """

    index: int
    epoch: int
    groups: tuple[int, ...]
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    is_filler: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class PlanBalance:
    """Excess of the busiest rank's tokens over the mean of the ranks, as a fraction; the other ranks idle that long.

    `*_mean` covers the whole schedule; `*_largest` omits steps with fewer groups than the first, such as the last of an
    epoch, which cannot be balanced. The k-th micro-batches of all ranks are compared: ZeRO-3 synchronises every layer.
    """

    step_mean: float
    step_largest: float
    micro_batch_mean: float
    micro_batch_largest: float


def epoch_order(num_groups: int, seed: int, epoch: int) -> list[int]:
    """Returns the order of the groups in an epoch: a shuffle seeded by (seed, epoch)."""
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
    """Divides groups among `world_size` ranks with the same number of micro-batches per rank.

    Assigns the longest group first to the emptiest bin (LPT), which is deterministic and within 4/3 of the optimum.
    With `level`, swaps groups until all bins are within 0.1 % of their mean or no swap helps: eight groups per rank
    suffice; with four, a few per cent may remain. A group above `max_tokens` gets its own bin.

    Args:
        groups: Indices into `num_tokens`.
        num_tokens: Number of tokens of each group in the language model.
        world_size: Number of ranks.
        max_tokens: Maximum number of tokens per micro-batch.
        level: Whether to swap groups between bins.
        row_tokens: For groups of padded rows, the row length of each group, which then has `num_tokens / row_tokens`
            rows. The limit applies after padding all rows of a bin to the longest one.

    Returns:
        `[rank][micro-batch]` lists of group indices; bins may be empty if there are fewer groups than bins.
    """
    # A group above the limit fills one bin only: counted in full, it would add bins that only fillers use.
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
        per_rank += 1 + per_rank // 128  # larger increments for very many bins: fewer attempts, a few bins free
    if level and world_size > 1:
        levelled = _level([list(batch) for batch in bins], num_tokens, max_tokens)
        bins = levelled if _fit(levelled, num_tokens, max_tokens, row_tokens) else bins
        bins = _snake(bins, num_tokens, world_size)
    # Bin b goes to rank b % world_size, so that the k-th micro-batches of all ranks run concurrently. Within a bin,
    # groups keep the order of the step.
    position_of = {group: i for i, group in enumerate(groups)}
    for batch in bins:
        batch.sort(key=position_of.__getitem__)
    return [[bins[k * world_size + rank] for k in range(per_rank)] for rank in range(world_size)]


def _fit(
    bins: Sequence[Sequence[int]], num_tokens: Sequence[int], max_tokens: int, row_tokens: Sequence[int] | None
) -> bool:
    """Returns whether every bin with more than one group is within `max_tokens`, including padding."""
    several = [batch for batch in bins if len(batch) > 1]
    if row_tokens is None:
        return all(sum(num_tokens[g] for g in batch) <= max_tokens for batch in several)
    return all(
        sum(num_tokens[g] // row_tokens[g] for g in batch) * max(row_tokens[g] for g in batch) <= max_tokens
        for batch in several
    )


def _level(bins: list[list[int]], num_tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Swaps groups between the fullest bin and others while this reduces the larger of the two.

    LPT leaves a few per cent between bins of few groups, and every rank waits for the fullest bin in every layer.
    """
    filled = [sum(num_tokens[g] for g in batch) for batch in bins]
    enough = _LEVEL_ENOUGH * sum(filled) / len(filled)
    # Emptiest first. Kept sorted: searching all bins for each swap would grow with the square of the ranks.
    order = sorted((size, b) for b, size in enumerate(filled))
    for _ in range(4 * len(bins)):
        fullest = order[bisect.bisect_left(order, (order[-1][0], -1))][1]  # the first of several
        if filled[fullest] <= enough:
            break
        best: tuple[int, int, int, int | None] | None = None
        for _, other in order[:_SWAP_PARTNERS]:
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
        for b, change in ((fullest, -moved), (other, moved)):
            del order[bisect.bisect_left(order, (filled[b], b))]
            filled[b] += change
            bisect.insort(order, (filled[b], b))
    return bins


def _snake(bins: list[list[int]], num_tokens: Sequence[int], world_size: int) -> list[list[int]]:
    """Sorts bins by size, reversing every second row of ranks, so that the k-th bins of all ranks are similar."""
    order = sorted(bins, key=lambda batch: (-sum(num_tokens[g] for g in batch), batch))
    rows = [order[start : start + world_size] for start in range(0, len(order), world_size)]
    return [batch for k, row in enumerate(rows) for batch in (row if k % 2 == 0 else row[::-1])]


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
    """Schedules the whole run: shuffled epochs of steps with `groups_per_step` groups; the last may be smaller.

    See `split_into_micro_batches` for `row_tokens`.

    Raises:
        ValueError: There are no groups.
    """
    if not num_tokens:
        raise ValueError("no groups to schedule: all groups were dropped, or the file is empty")
    steps: list[PlannedStep] = []
    for epoch in range(epochs):
        order = epoch_order(len(num_tokens), seed, epoch)
        for start in range(0, len(order), groups_per_step):
            if max_steps and len(steps) == max_steps:
                return steps
            groups = order[start : start + groups_per_step]
            step = plan_step(len(steps), epoch, groups, num_tokens, world_size, max_tokens, row_tokens)
            steps.append(step)
    return steps


def plan_step(
    index: int,
    epoch: int,
    groups: list[int],
    num_tokens: Sequence[int],
    world_size: int,
    max_tokens: int,
    row_tokens: Sequence[int] | None = None,
) -> PlannedStep:
    """Schedules the groups of one step; see `split_into_micro_batches`."""
    bins = split_into_micro_batches(groups, num_tokens, world_size, max_tokens, row_tokens=row_tokens)
    shortest = min(groups, key=lambda g: (num_tokens[g], g))
    filler = tuple(tuple(not batch for batch in rank) for rank in bins)
    micro = tuple(tuple(tuple(batch) if batch else (shortest,) for batch in rank) for rank in bins)
    return PlannedStep(index, epoch, tuple(groups), micro, filler)


def plan_balance(steps: Sequence[PlannedStep], num_tokens: Sequence[int]) -> PlanBalance:
    """Measures the balance of a schedule, including fillers, since they take time."""
    steps_excess, micro_excess = _Excess(), _Excess()
    for step in steps:
        is_whole = len(step.groups) == len(steps[0].groups)
        tokens = [[sum(num_tokens[g] for g in batch) for batch in rank] for rank in step.micro_batches]
        steps_excess.add([sum(rank) for rank in tokens], is_whole)
        for concurrent in zip(*tokens, strict=True):
            micro_excess.add(concurrent, is_whole)
    return PlanBalance(steps_excess.mean, steps_excess.largest, micro_excess.mean, micro_excess.largest)


class _Excess:
    """Excess of the busiest rank's tokens over the mean: token-weighted average over all steps, and maximum."""

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
