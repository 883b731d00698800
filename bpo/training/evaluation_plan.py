"""What evaluations during training measure: read and checked before the model is loaded."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bpo.config.training import Config
from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.results import score_benchmark
from bpo.evaluation.suite import make_benchmark, read_suite, with_usable_images
from bpo.formats.bad_records import BadRecords
from bpo.losses.program import LossProgram
from bpo.training.metrics import StepSums, step_metrics

PREFIX = "eval/"


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated, read and checked before the model is loaded.

    Attributes:
        benchmarks: Empty if only held-out groups are evaluated.
        lower_is_better: Whether the best value of `train.keep_best` is the lowest.
    """

    benchmarks: tuple[Benchmark, ...] = ()
    lower_is_better: bool = False


def plan_evaluation(config: Config, program: LossProgram) -> EvaluationPlan | None:
    """Reads the benchmarks of `evaluation.*`, each with a sample of `train.evaluation_images` images.

    Options that name CHAIR's instances also measure whether answers keep the form that a question asks for.

    Returns:
        None if `train.evaluate_every_steps` is 0.

    Raises:
        ValueError: nothing is configured, a file has the wrong format, an option does not apply during training, or
            `train.keep_best` is not one of the metrics.
    """
    train, options = config.train, config.evaluation
    if not train.evaluate_every_steps:
        return None
    benchmarks: tuple[Benchmark, ...] = ()
    if options.suite or options.chair_instances or options.pope_questions:
        if options.decoding != "plain":
            raise ValueError(
                f"evaluation.decoding is {options.decoding!r}; while training, answers are decoded plainly: remove it, "
                "and use it in bpo evaluate"
            )
        benchmarks = _read_benchmarks(config)
    elif not train.held_out_groups:
        raise ValueError(
            "train.evaluate_every_steps is set, but there is nothing to evaluate: set train.held_out_groups, "
            "evaluation.suite or evaluation.chair_instances"
        )
    # Without keep_best too: scores that cannot be computed fail here, not after the reference pass.
    known = _directions(benchmarks, program if train.held_out_groups else None)
    if not train.keep_best:
        return EvaluationPlan(benchmarks)
    if train.keep_best not in known:
        close = difflib.get_close_matches(train.keep_best, known, n=1, cutoff=0.4)
        meant = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise ValueError(f"train.keep_best is {train.keep_best!r}, which is no metric of this evaluation; {meant}")
    return EvaluationPlan(benchmarks, known[train.keep_best])


def _read_benchmarks(config: Config) -> tuple[Benchmark, ...]:
    options = replace(config.evaluation, sample=config.train.evaluation_images, questions="", format="")
    suite = read_suite(options)
    if options.chair_instances and not options.suite:
        guard = make_benchmark({"type": "format_guard", "instances": options.chair_instances})
        (chair,) = (benchmark for benchmark in suite.benchmarks if benchmark.options.type == "chair")
        suite = replace(suite, benchmarks=(*suite.benchmarks, guard.restricted(chair.images)))
    root, bad = Path(config.data.image_root or "."), BadRecords.from_config(config.data)
    return with_usable_images(suite, root, bad).benchmarks


def _directions(benchmarks: Sequence[Benchmark], program: LossProgram | None) -> dict[str, bool]:
    """Metric -> whether lower is better; the names are those of an evaluation without answers or pairs."""
    known = {}
    if program is not None:
        for name in step_metrics([1.0] * len(StepSums.zero(program).flat()), program):
            known[PREFIX + name] = name.startswith(("loss", "preference_loss", "nll"))
    with _without_warnings():
        for benchmark in benchmarks:
            for name in score_benchmark(benchmark, [""] * len(benchmark.questions)).metrics:
                known[f"{PREFIX}{benchmark.name}/{name}"] = name in benchmark.lower_is_better
    return known


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides what benchmarks log about empty answers."""
    logger = logging.getLogger("bpo.evaluation")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
