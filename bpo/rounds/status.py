"""`bpo rounds --status DIR`: a table of all stages, and of the metrics by round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bpo.config.io import load_config
from bpo.job.journal import JournalReader
from bpo.rounds.plan import plan_rounds
from bpo.rounds.run import HISTORY
from bpo.rounds.stages import Stage, trained_steps

# Shown for each round if the suite has them; all others are in round-N/results.json.
_SHOWN = 6


def status_table(root: Path) -> str:
    """The state, numbers and seconds of every stage, then the metrics of each evaluated round.

    Raises:
        ValueError: The folder is not of `bpo rounds`.
    """
    record = root / "config.yaml"
    if not record.is_file():
        raise ValueError(f"{root} has no config.yaml; give the rounds.output_dir of a `bpo rounds`")
    stages = plan_rounds(load_config(["--config", str(record)], prog="bpo rounds --status"))
    seconds = _seconds(root)
    rows = [("round", "stage", "state", "", "seconds")]
    for stage in stages:
        spent = seconds.get((stage.round, stage.name))
        shown = "" if spent is None else f"{spent:.1f}"
        rows.append((str(stage.round or ""), stage.name, state_of(stage), _detail(stage), shown))
    lines = _aligned(rows)
    metrics = {s.round: _metrics(s.result) for s in stages if s.name == "evaluate" and s.is_finished()}
    return "\n".join([*lines, *([""] if metrics else []), *_metric_lines(metrics)])


def state_of(stage: Stage) -> str:
    """`finished`; `begun` if it has left something; else `waiting`."""
    if stage.is_finished():
        return "finished"
    parts = stage.result.with_name(f"{stage.result.name}.parts")
    return "begun" if stage.result.exists() or parts.exists() else "waiting"


def _seconds(root: Path) -> dict[tuple[int, str], float]:
    """Seconds of each stage, over all starts; none of stages that ran as jobs of their own."""
    found: dict[tuple[int, str], float] = {}
    if (root / HISTORY).exists():
        for _, entry in JournalReader(root / HISTORY).poll(dict):
            key = (int(entry["round"]), str(entry["stage"]))
            found[key] = found.get(key, 0.0) + float(entry["seconds"])
    return found


def _detail(stage: Stage) -> str:
    if stage.name == "train":
        done, planned = trained_steps(stage.result)
        return f"step {done} of {planned}" if planned else ""
    summary = {
        "generate": stage.folder / "candidates.jsonl.summary.json",
        "judge": stage.result / "summary.json",
        "select": stage.folder / "groups.jsonl.summary.json",
    }.get(stage.name)
    if summary is None or not stage.is_finished():
        return ""
    numbers = _read(summary)
    named = [f"{numbers[key]:,} {label}" for key, label in _NUMBERS if isinstance(numbers.get(key), int)]
    return ", ".join(named)


_NUMBERS = (
    ("num_groups", "groups"),
    ("num_pairs", "pairs"),
    ("num_judged", "judged"),
    ("num_failed", "failed"),
    ("num_quarantined", "quarantined"),
)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _metrics(results: Path) -> dict[str, float]:
    metrics = _read(results).get("metrics", {})
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _metric_lines(of_round: Mapping[int, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for metrics in of_round.values() for name in metrics))[:_SHOWN]
    if not names:
        return []
    rows = [("round", *names)]
    for number, metrics in of_round.items():
        rows.append((str(number), *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names)))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
