"""The printed table."""

from __future__ import annotations

from pathlib import Path

from bpo.evaluation.benchmarks.chair import ChairBenchmark
from bpo.evaluation.results import score_benchmark
from bpo.evaluation.suite import make_benchmark
from bpo.evaluation.tables import cells_of, format_results
from tests.evaluation.suites import write_files


def test_rates_are_in_percent_with_intervals_and_the_length_of_the_answers(tmp_path: Path) -> None:
    write_files(tmp_path, ("a.png",))
    chair = make_benchmark({"type": "chair", "instances": str(tmp_path / "instances.json")})
    assert format_results([score_benchmark(chair, ["A dog and a cat."])]).splitlines() == [
        "chair: 1 questions, 1 images, answers of 5.0 words [5.0, 5.0]",
        "  chair_i   50.0    [50.0, 50.0]  lower is better",
        "  chair_s  100.0  [100.0, 100.0]  lower is better",
        "  recall   100.0  [100.0, 100.0]",
    ]


def test_metrics_that_are_no_fractions_are_printed_as_they_are() -> None:
    class Points(ChairBenchmark):
        not_fractions = frozenset({"points"})

    assert cells_of(Points, "points", (120.0, 100.25, 140.0)) == ["120.0", "[100.2, 140.0]"]
    assert cells_of(Points, "recall", (0.5, 0.25, 0.75)) == ["50.0", "[25.0, 75.0]"]
