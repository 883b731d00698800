"""Results and comparisons as aligned text: rates in percent with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.intervals import LENGTH
from bpo.evaluation.results import BenchmarkResult

_LOWER = "lower is better"


def format_results(results: Sequence[BenchmarkResult]) -> str:
    """One block per benchmark: every metric with its interval, and the mean length of the answers beside its name."""
    return "\n\n".join(_block(result) for result in results)


def _block(result: BenchmarkResult) -> str:
    benchmark = result.benchmark
    words, low, high = result.intervals[LENGTH]
    head = (
        f"{benchmark.name}: {len(benchmark.questions)} questions, {len(benchmark.images)} images, "
        f"answers of {words:.1f} words [{low:.1f}, {high:.1f}]"
    )
    rows = [
        [f"  {name}", *cells_of(type(benchmark), name, values), _LOWER if name in benchmark.lower_is_better else ""]
        for name, values in result.intervals.items()
        if name != LENGTH
    ]
    return "\n".join([head, *align(rows)])


def cells_of(kind: type[Benchmark], metric: str, values: tuple[float, float, float]) -> list[str]:
    """A value and its interval, in percent unless the metric is no fraction."""
    factor = 1 if metric == LENGTH or metric in kind.not_fractions else 100
    value, low, high = (f"{factor * number:.1f}" for number in values)
    return [value, f"[{low}, {high}]"]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal numbers of cells: the first column to the left, the others to the right, the last to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
    return lines
