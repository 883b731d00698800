"""Evaluations during training: held-out groups and a small suite of benchmarks, answered by the model that trains.

    before step 1, after every `train.evaluate_every_steps` steps, after the last step
    metrics.jsonl   {"step": n, "eval/loss": ..., "eval/chair/chair_i": ...}, a line of its own

The evaluation of a step precedes its checkpoint. A start that continues from a checkpoint therefore finds its
evaluation in metrics.jsonl, unless a signal cut it short; then it is done before the next step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bpo.config.training import Config
from bpo.data.encode import Encoder
from bpo.engine import TrainingEngine
from bpo.evaluation.answers import requests_of
from bpo.evaluation.results import flat_metrics, score_benchmark
from bpo.job.collectives import from_rank_0
from bpo.job.exits import Interrupted
from bpo.job.guard import RunGuard
from bpo.job.journal import JournalReader
from bpo.job.signals import StopRequest
from bpo.training.answering import answer_together
from bpo.training.evaluation_plan import PREFIX, EvaluationPlan
from bpo.training.held_out import HeldOutLoss
from bpo.training.report import StepReport

logger = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of a run; all ranks share the work and make the same calls.

    Args:
        plan: None evaluates nothing.
        held_out: None leaves out the loss.
        done: Steps finished by earlier starts.
        total: Steps of the run.

    Attributes:
        stopped: Whether a signal has cut an evaluation short.
    """

    def __init__(
        self,
        config: Config,
        plan: EvaluationPlan | None,
        trainer: TrainingEngine,
        encoder: Encoder,
        held_out: HeldOutLoss | None,
        guard: RunGuard,
        stop: StopRequest | None,
        *,
        done: int,
        total: int,
    ):
        self.config, self.plan, self.trainer, self.encoder = config, plan, trainer, encoder
        self.held_out, self.guard, self.stop, self.total = held_out, guard, stop, total
        self.stopped = False
        self._finished: dict[int, dict[str, float]] = {}
        if plan is not None and config.train.resume:
            path = Path(config.train.output_dir) / "metrics.jsonl"
            self._finished = dict(from_rank_0(lambda: finished_evaluations(path, done)))

    def at(self, step: int, report: StepReport, best: int | None) -> bool:
        """Evaluates the model after `step` steps if that is due and not yet done.

        Args:
            report: Gets the metrics.
            best: Step of the best checkpoint so far.

        Returns:
            Whether the model is better than at `best` by `train.keep_best`.

        Raises:
            Interrupted: a signal came before step 1, where there is nothing to save; later `stopped` is set.
        """
        if not self._is_due(step):
            return False
        if step not in self._finished and not self._evaluate(step, report):
            return False
        # Also if an earlier start has evaluated it: a kill may have come before the checkpoint was named.
        return self._is_better(step, best)

    def _evaluate(self, step: int, report: StepReport) -> bool:
        """Whether the evaluation was not stopped."""
        self.guard.watchdog.beat(f"the evaluation after step {step}")
        started = time.perf_counter()
        try:
            with kept_random_state(self.trainer.device):
                metrics = self._measure()
        except Interrupted:
            if step == 0:
                raise
            self.stopped = True
            return False
        metrics = {PREFIX + name: value for name, value in metrics.items()}
        metrics[f"{PREFIX}seconds"] = time.perf_counter() - started
        report.evaluation(step, metrics)
        self._finished[step] = metrics
        return True

    def _is_due(self, step: int) -> bool:
        return self.plan is not None and (step % self.config.train.evaluate_every_steps == 0 or step == self.total)

    def _measure(self) -> dict[str, float]:
        assert self.plan is not None
        metrics = self.held_out.metrics(self.stop) if self.held_out is not None else {}
        options, benchmarks = self.config.evaluation, self.plan.benchmarks
        if not benchmarks:
            return metrics
        requests = [requests_of(benchmark, options) for benchmark in benchmarks]
        every = [request for of_benchmark in requests for request in of_benchmark]
        answers = answer_together(self.trainer, self.encoder, every, options.batch_size, self.stop)

        def score() -> dict[str, float]:
            pairs = zip(benchmarks, requests, strict=True)
            return flat_metrics([score_benchmark(b, [answers[r] for r in of_b]) for b, of_b in pairs])

        return metrics | from_rank_0(score)

    def _is_better(self, step: int, best: int | None) -> bool:
        """The base model has no checkpoint, so its evaluation is compared with no other."""
        name = self.config.train.keep_best
        if not name or step == 0:
            return False
        value = self._finished[step].get(name, math.nan)
        before = self._finished.get(best, {}).get(name, math.nan) if best is not None else math.nan
        assert self.plan is not None
        if math.isnan(value) or math.isnan(before):
            return not math.isnan(value)
        return value < before if self.plan.lower_is_better else value > before


def finished_evaluations(path: Path, done: int) -> list[tuple[int, dict[str, float]]]:
    """Step and metrics of the evaluations in a metrics.jsonl that precede the steps to be run."""

    def parse(entry: Any) -> tuple[int, dict[str, float]]:
        return int(entry["step"]), {name: value for name, value in entry.items() if name.startswith(PREFIX)}

    entries = [entry for _, entry in JournalReader(path).poll(parse)] if path.exists() else []
    return [(step, metrics) for step, metrics in entries if metrics and step <= done]


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Training draws what it would have drawn without the body, and finds its memory free."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()  # caches of generation fragment it
