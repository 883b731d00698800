"""Scores of a suite's benchmarks: metrics with intervals, as JSON and as official answer files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import requests_of
from bpo.evaluation.benchmark import Benchmark, Scores
from bpo.evaluation.intervals import UnitCounts, count_units, metric_intervals, values_of
from bpo.evaluation.suite import Suite
from bpo.job.durable import file_digest


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's answers and what they amount to."""

    benchmark: Benchmark
    answers: tuple[str, ...]
    scores: Scores
    counts: UnitCounts

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metric -> value, with the mean length of the answers in words."""
        return {name: float(value) for name, value in values_of(self.benchmark.metrics, self.counts.sums()).items()}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """Metric -> (value, low, high), from a bootstrap over units."""
        return metric_intervals(self.counts, self.benchmark.metrics)

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.benchmark.options.type,
            "name": self.benchmark.name,
            "settings": settings_of(self.benchmark),
            "metrics": {
                name: {"value": value, "low": low, "high": high} for name, (value, low, high) in self.intervals.items()
            },
            "lower_is_better": sorted(self.benchmark.lower_is_better),
            "counts": self.counts.to_json(),
            "items": list(self.scores.items),
        }


def settings_of(benchmark: Benchmark) -> dict[str, Any]:
    """What the questions and their scores depend on; two results are comparable only if it is equal."""
    asked = "\n".join(f"{question.id}\t{question.image}\t{question.text}" for question in benchmark.questions)
    return {
        "options": asdict(benchmark.options),
        "max_new_tokens": benchmark.answer_length,
        "num_questions": len(benchmark.questions),
        "num_images": len(benchmark.images),
        "questions_sha256": _sha256(asked),
        "images_sha256": _sha256("\n".join(sorted(benchmark.images))),
        "files_sha256": {path: file_digest(Path(path)) for path in benchmark.files},
    }


def score_benchmark(benchmark: Benchmark, answers: Sequence[str]) -> BenchmarkResult:
    """Scores one answer per question, in order."""
    scores = benchmark.score(answers)
    return BenchmarkResult(benchmark, tuple(answers), scores, count_units(benchmark.questions, answers, scores))


def score_suite(suite: Suite, journal: AnswerJournal, options: EvaluationConfig) -> list[BenchmarkResult]:
    """Scores the answers in `journal`, waiting for those of other ranks; raises as `AnswerJournal.all` does."""
    return [
        score_benchmark(
            benchmark, journal.all([r.key for r in requests_of(benchmark, options)], options.stall_timeout_s)
        )
        for benchmark in suite.benchmarks
    ]


def flat_metrics(results: Sequence[BenchmarkResult]) -> dict[str, float]:
    """`{"chair/chair_i": 0.1, ...}` of all benchmarks, by name."""
    return {f"{result.benchmark.name}/{name}": value for result in results for name, value in result.metrics.items()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
