"""The benchmarks by the name that a suite gives them."""

from __future__ import annotations

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.benchmarks.chair import ChairBenchmark
from bpo.evaluation.benchmarks.pope import PopeBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "chair": ChairBenchmark,
    "pope": PopeBenchmark,
}
