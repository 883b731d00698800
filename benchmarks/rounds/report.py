"""The table of rounds: medians and ranges over seeds, by method and round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

METRICS = {
    "CHAIR_i": "chair/chair_i",
    "recall": "chair/recall",
    "words": "chair/mean_answer_words",
    "POPE accuracy": "pope/accuracy",
}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per method and round: values over the seeds of each metric, of the pairs and of the seconds."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["method"], row["round"])
        entry = found.setdefault(key, {"method": key[0], "round": key[1], "pairs": [], "seconds": [], "metrics": {}})
        for label, name in METRICS.items():
            entry["metrics"].setdefault(label, []).append(row["metrics"][name])
        entry["seconds"].append(sum(row["seconds"].values()))
        if row.get("pairs") is not None:
            entry["pairs"].append(row["pairs"])
    return list(found.values())


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; shares in percent."""
    lines = [f"| method | round | {' | '.join(METRICS)} | pairs | seconds |", "|---|---|" + "---|" * (len(METRICS) + 2)]
    for entry in entries:
        cells = [_spread(values, 1 if label == "words" else 100) for label, values in entry["metrics"].items()]
        pairs = f"{median(entry['pairs']):,.0f}" if entry["pairs"] else ""
        seconds = f"{median(entry['seconds']):.0f}" if any(entry["seconds"]) else ""
        lines.append(f"| {entry['method']} | {entry['round']} | {' | '.join(cells)} | {pairs} | {seconds} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], factor: float) -> str:
    low, high = factor * min(values), factor * max(values)
    middle = f"{factor * median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({low:.1f}-{high:.1f})"
