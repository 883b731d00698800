"""The benchmarks by the name that a suite gives them."""

from __future__ import annotations

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.benchmarks.chair import ChairBenchmark
from bpo.evaluation.benchmarks.judged import LlavaBenchBenchmark, MMHalBenchmark, MMVetBenchmark
from bpo.evaluation.benchmarks.pope import PopeBenchmark
from bpo.evaluation.benchmarks.shr import ShrBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "chair": ChairBenchmark,
    "llava_bench": LlavaBenchBenchmark,
    "mmhal": MMHalBenchmark,
    "mmvet": MMVetBenchmark,
    "pope": PopeBenchmark,
    "shr": ShrBenchmark,
}
