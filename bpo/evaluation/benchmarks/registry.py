"""The benchmarks by the name that a suite gives them."""

from __future__ import annotations

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.benchmarks.amber_discriminative import AmberDiscriminativeBenchmark
from bpo.evaluation.benchmarks.amber_generative import AmberGenerativeBenchmark
from bpo.evaluation.benchmarks.chair import ChairBenchmark
from bpo.evaluation.benchmarks.choice import ChoiceBenchmark
from bpo.evaluation.benchmarks.format_guard import FormatGuardBenchmark
from bpo.evaluation.benchmarks.hallusion import HallusionBenchmark
from bpo.evaluation.benchmarks.judged import LlavaBenchBenchmark, MMHalBenchmark, MMVetBenchmark
from bpo.evaluation.benchmarks.mme import MmeBenchmark
from bpo.evaluation.benchmarks.objhal import ObjectHalBenchmark
from bpo.evaluation.benchmarks.pope import PopeBenchmark
from bpo.evaluation.benchmarks.repetition import RepetitionBenchmark
from bpo.evaluation.benchmarks.shr import ShrBenchmark
from bpo.evaluation.benchmarks.verifier import VerifierBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "amber_discriminative": AmberDiscriminativeBenchmark,
    "amber_generative": AmberGenerativeBenchmark,
    "chair": ChairBenchmark,
    "choice": ChoiceBenchmark,
    "format_guard": FormatGuardBenchmark,
    "hallusion": HallusionBenchmark,
    "llava_bench": LlavaBenchBenchmark,
    "mme": MmeBenchmark,
    "mmhal": MMHalBenchmark,
    "mmvet": MMVetBenchmark,
    "objhal": ObjectHalBenchmark,
    "pope": PopeBenchmark,
    "repetition": RepetitionBenchmark,
    "shr": ShrBenchmark,
    "verifier": VerifierBenchmark,
}
