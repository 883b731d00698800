"""Medians over the seeds, as JSON and as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.methods.cells import BASE, PUBLISHED, WITH_NLL

FIGURES = ("chair_i", "chair_s", "recall")
COSTS = ("step_seconds", "tokens_per_step", "reference_seconds", "nll_first", "nll_last")
Cell = Mapping[str, Any]


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Method -> column -> figure -> median, least and most over its seeds; `failed` counts those that diverged."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        for column in (PUBLISHED, WITH_NLL):
            own = [cell for cell in cells if (cell["method"], cell["column"]) == (method, column)]
            if own:
                found.setdefault(method, {})[column] = _medians(own)
    return found


def _medians(cells: Sequence[Cell]) -> dict[str, Any]:
    finished = [cell for cell in cells if "failed" not in cell]
    entry: dict[str, Any] = {"seeds": [cell["seed"] for cell in cells], "failed": len(cells) - len(finished)}
    for name in (*FIGURES, *COSTS):
        values = sorted(cell[name] for cell in finished if name in cell)
        if values:
            entry[name] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
    return entry


def table(found: Mapping[str, Any]) -> str:
    """One row per method: figures in percent, median (least to most), of both columns.

    Ordered by CHAIR_i with a likelihood term, the method's own or the one added: without, a method may name fewer wrong
    objects because it names fewer objects at all.
    Medians are over the seeds that did not diverge, the number of the others is given.
    """
    lines = [
        "| method | CHAIR_i | CHAIR_s | recall | CHAIR_i + NLL | CHAIR_s + NLL | recall + NLL "
        "| tokens per step | s per step | reference pass, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in sorted(found, key=lambda name: (_rate(found[name]), name)):
        published, with_nll = found[method][PUBLISHED], found[method].get(WITH_NLL)
        # Its own likelihood term: the second column would be the first.
        second = ["as published" if method != BASE else "-"] * 3 if with_nll is None else _percents(with_nll)
        costs = [_number(published, "tokens_per_step", 0), _number(published, "step_seconds", 3)]
        cells = [method, *_percents(published), *second, *costs, _number(published, "reference_seconds", 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(columns: Mapping[str, Any]) -> float:
    entry = columns.get(WITH_NLL, columns[PUBLISHED])
    return float(entry["chair_i"]["median"]) if "chair_i" in entry else 2.0


def _percents(entry: Mapping[str, Any]) -> list[str]:
    if "chair_i" not in entry:
        return ["diverged"] * len(FIGURES)
    texts = []
    for name in FIGURES:
        middle, least, most = (100 * entry[name][key] for key in ("median", "least", "most"))
        texts.append(f"{middle:.1f}" if least == most else f"{middle:.1f} ({least:.1f} to {most:.1f})")
    if entry["failed"]:
        texts[0] += f", {entry['failed']} diverged"
    return texts


def _number(entry: Mapping[str, Any], name: str, digits: int) -> str:
    return f"{entry[name]['median']:.{digits}f}" if name in entry else "-"
