"""Balances preference groups that exist: reads them in any format, writes them with weights or without some answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from bpo.bootstrap.measure.pairs import best_completion
from bpo.bootstrap.select.balancer import WEIGHT_DIGITS, Balancer
from bpo.config.measure import MeasureConfig
from bpo.config.select import SelectConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.exporters import write_jsonl
from bpo.formats.files import iterate_groups
from bpo.records import PreferenceGroup


def balance_groups(
    groups: Path,
    out: Path,
    options: SelectConfig,
    *,
    seed: int = 0,
    measure: MeasureConfig | None = None,
    bad: BadRecords | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the groups so that the text alone does not tell preferred from rejected answers, type by type.

    `weights` replaces the weight of every rejected answer; `selection` keeps one of each type per group, or none. A
    group that is left without a rejected answer is not written. Memory is that of `options.block_records` groups.

    Args:
        groups: Preference groups in any supported format.
        out: The file to write, replaced as a whole.
        options: `balance` is `selection` or `weights`.
        bad: Handling of bad records; by default the first one raises an error.

    Returns:
        Type of the rejected answers -> what was achieved (`Balancer.report`).

    Raises:
        ValueError: The file cannot be used, `options.balance` is `none`, or `out` is the file that is read.
    """
    if options.balance == "none":
        raise ValueError("bootstrap.select.balance is none; set it to selection or weights")
    if out.resolve() == groups.resolve():
        raise ValueError(f"{out} is the file that is read; write to another one")
    balancers: dict[str, Balancer] = {}

    def balanced() -> Iterator[PreferenceGroup]:
        stream = iterate_groups(groups, bad or BadRecords())
        while block := list(islice(stream, options.block_records)):
            for kind in sorted(_rejected_types(block) - balancers.keys()):
                balancers[kind] = Balancer(options, seed, kind, measure or MeasureConfig())
            yield from _balanced_block(block, balancers)

    write_jsonl(balanced(), out)
    return {kind: balancer.report() for kind, balancer in sorted(balancers.items())}


def _balanced_block(block: Sequence[PreferenceGroup], balancers: dict[str, Balancer]) -> Iterator[PreferenceGroup]:
    weights: list[dict[int, float]] = [{} for _ in block]  # index of a rejected completion -> its weight
    best = [best_completion(group) for group in block]
    for kind, balancer in balancers.items():
        members = {
            number: [
                index
                for index, completion in enumerate(group.completions)
                if completion.type == kind and not completion.view and completion.score < best[number].score
            ]
            for number, group in enumerate(block)
        }
        members = {number: indices for number, indices in members.items() if indices}
        decided = balancer.decide(
            [block[number].id for number in members],
            [best[number].response for number in members],
            [[block[number].completions[index].response for index in indices] for number, indices in members.items()],
        )
        for (number, indices), of_group in zip(members.items(), decided, strict=True):
            weights[number].update(zip(indices, map(float, of_group), strict=True))
    for group, of_group in zip(block, weights, strict=True):
        if any(of_group.values()):
            kept = [
                replace(completion, weight=round(of_group[index], WEIGHT_DIGITS)) if index in of_group else completion
                for index, completion in enumerate(group.completions)
                if of_group.get(index, 1.0)
            ]
            yield replace(group, completions=tuple(kept))


def _rejected_types(groups: Iterable[PreferenceGroup]) -> set[str]:
    return {
        completion.type
        for group in groups
        for completion in group.own_completions
        if completion.score < best_completion(group).score
    }
