"""`evaluation.decoding=grid`: many sampling settings, chosen and reported on different units (after arXiv 2403.05262).

The best of many settings on the questions that chose it looks better than it is. A setting is therefore chosen on one
half of the units of each benchmark and reported on the other half; the best over all units is only called the oracle.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.config.decoding import SamplingConfig
from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import Request, answer_requests, requests_of
from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.intervals import UnitCounts
from bpo.evaluation.results import score_benchmark
from bpo.evaluation.suite import Suite

if TYPE_CHECKING:
    from bpo.data.encode import Encoder
    from bpo.model.decoding.cost import DecodingCost

# Name of the setting without a grid.
BASE = "evaluation.sampling"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GridResult:
    """The headline metric, the first one of its benchmark, under each setting.

    Attributes:
        metric: Its name.
        values: Setting -> its value over all units.
        chosen: Best setting on the first half of the units.
        choosing: Its value there, which is too good.
        reported: Its value on the other half.
        base: Value of `evaluation.sampling` on the other half.
        oracle: Best setting over all units: an upper bound, not a result.
    """

    benchmark: str
    metric: str
    values: dict[str, float]
    chosen: str
    choosing: float
    reported: float
    base: float
    oracle: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"oracle_value": self.values[self.oracle]}

    def __str__(self) -> str:
        return (
            f"{self.benchmark}: {self.metric} {self.reported:.4f} with {self.chosen} ({self.base:.4f} without), on the "
            f"half of the units that did not choose it; oracle: {self.values[self.oracle]:.4f} with {self.oracle}"
        )


def settings_of(options: EvaluationConfig) -> dict[str, SamplingConfig]:
    """Name -> setting of the grid: each entry of each list of `evaluation.grid`."""
    grid, seed = options.grid, options.sampling.seed
    return {
        **{f"temperature={t:g}": SamplingConfig(temperature=t, seed=seed) for t in grid.temperature},
        **{f"top_p={p:g}": SamplingConfig(temperature=1.0, top_p=p, seed=seed) for p in grid.top_p},
        **{f"top_k={k}": SamplingConfig(temperature=1.0, top_k=k, seed=seed) for k in grid.top_k},
    }


def answer_grid(
    model: Any,
    encoder: Encoder,
    suite: Suite,
    options: EvaluationConfig,
    journal: AnswerJournal,
    *,
    progress: bool = True,
    cost: DecodingCost | None = None,
) -> None:
    """Generates this rank's share of the answers under each setting; raises as `answer_requests` does."""
    for name, sampling in settings_of(options).items():
        requests = [request for benchmark in suite.benchmarks for request in _requests(benchmark, options, name)]
        plain = replace(options, decoding="plain", sampling=sampling)
        answer_requests(model, encoder, requests, journal, plain, progress=progress, cost=cost)


def score_grid(suite: Suite, journal: AnswerJournal, options: EvaluationConfig) -> list[GridResult]:
    """Scores all settings, waiting for answers of other ranks; leaves out benchmarks without metrics or with one unit.

    Raises:
        TimeoutError: See `AnswerJournal.all`.
    """
    results = []
    for benchmark in suite.benchmarks:
        counts = {}
        for name in (BASE, *settings_of(options)):
            keys = [request.key for request in _requests(benchmark, options, name)]
            counts[name] = score_benchmark(benchmark, journal.all(keys, options.stall_timeout_s)).counts
        if len(counts[BASE].units) < 2 or not benchmark.metrics(counts[BASE].sums()):
            logger.warning("%s: no setting can be chosen; it has one unit or no metric", benchmark.name)
            continue
        results.append(choose_setting(benchmark, counts))
    return results


def choose_setting(benchmark: Benchmark, counts: Mapping[str, UnitCounts]) -> GridResult:
    """Chooses on a random half of the units and reports on the other.

    Args:
        counts: Setting -> counts of the same units, at least two; `BASE` is one of them.
    """
    num_units = len(counts[BASE].units)
    order = np.random.default_rng(0).permutation(num_units)
    metric = next(iter(benchmark.metrics(counts[BASE].sums())))
    sign = -1 if metric in benchmark.lower_is_better else 1

    def values(units: Sequence[int] | np.ndarray) -> dict[str, float]:
        halves = {name: replace(own, counts_UC=own.counts_UC[units]) for name, own in counts.items()}
        return {name: float(benchmark.metrics(own.sums())[metric]) for name, own in halves.items()}

    def best(of: Mapping[str, float]) -> str:
        return max(of, key=lambda name: sign * of[name])

    everything, choosing, reporting = map(values, (order, order[: num_units // 2], order[num_units // 2 :]))
    chosen = best(choosing)
    return GridResult(
        benchmark=benchmark.name,
        metric=metric,
        values=everything,
        chosen=chosen,
        choosing=choosing[chosen],
        reported=reporting[chosen],
        base=reporting[BASE],
        oracle=best(everything),
    )


def _requests(benchmark: Benchmark, options: EvaluationConfig, setting: str) -> list[Request]:
    """The benchmark's requests, those of a setting of the grid with keys of their own."""
    requests = requests_of(benchmark, options)
    return requests if setting == BASE else [replace(request, scope=setting) for request in requests]
