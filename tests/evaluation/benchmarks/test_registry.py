"""Every benchmark is registered under the type that its options have by default."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from bpo.evaluation import benchmarks
from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.benchmarks.registry import BENCHMARKS


def test_names_are_the_types_of_options() -> None:
    assert {name: kind.Options().type for name, kind in BENCHMARKS.items()} == {name: name for name in BENCHMARKS}


def test_every_complete_benchmark_is_registered() -> None:
    modules = [
        importlib.import_module(f"{benchmarks.__name__}.{m.name}") for m in pkgutil.iter_modules(benchmarks.__path__)
    ]
    kinds = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    complete = {kind for kind in kinds if issubclass(kind, Benchmark) and not inspect.isabstract(kind)}
    assert complete == set(BENCHMARKS.values())
