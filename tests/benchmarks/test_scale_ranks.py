"""Simulated ranks: the fit, and that the document shows the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scale_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_exponent_of_a_power_of_the_ranks(power: int) -> None:
    """One and two ranks, which have no work in common yet, do not count."""
    seconds = {ranks: 0.003 * ranks**power if ranks >= 4 else 99.0 for ranks in scale_ranks.RANKS}
    assert scale_ranks.exponent(seconds) == pytest.approx(power)


@pytest.mark.parametrize("name", scale_ranks.PARTS)
def test_each_part_runs(name: str) -> None:
    assert scale_ranks.PARTS[name](3) > 0


def test_the_document_shows_the_committed_figures() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "scale-ranks.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    for row in report["rows"]:
        cells = [f"{1000 * row['seconds'][ranks]:.2f}" for ranks in ("1", "8", "64")]
        assert f"| {row['part']} | {' | '.join(cells)} | {row['exponent']:.2f} |" in document
