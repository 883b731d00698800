"""The benchmarks by the name that a suite gives them."""

from __future__ import annotations

from bpo.evaluation.benchmark import Benchmark

BENCHMARKS: dict[str, type[Benchmark]] = {}
