"""`bpo demo`: Bootstrapped Preference Optimization from scratch to a report, in minutes on two CPU cores.

Creates a synthetic world and a base model with a strong language prior, bootstraps rejected answers from that model,
measures these answers, trains with DeepSpeed, and evaluates hallucination before and after, by source and with
controls.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bpo.config.training import Config, ExportConfig
from bpo.tools.demo.files import World
from bpo.tools.demo.gallery import evaluation_examples, training_examples
from bpo.tools.demo.recipe import BASE, VARIANTS, Recipe, Variant
from bpo.tools.demo.report import METRICS, Figures, ReportData, read_curves, write_report
from bpo.tools.demo.report import Variant as ReportVariant
from bpo.tools.demo.training import run_training
from bpo.tools.measures import TypeMeasures, read_measures

logger = logging.getLogger(__name__)

TITLE = "Bootstrapped Preference Optimization: the demo"
EXPLANATION = (
    "A tiny multimodal model was trained on captions of scenes with strong object co-occurrence, so it hallucinates "
    "co-occurring objects that are absent. Rejected answers are its answers to noised images, and annotations into "
    "which its own language model, without the image, injected errors; annotations of other images are a third source, "
    "trained on alone. Chosen answers are the annotations, which follow the distribution of its training data. All "
    "models are evaluated on held-out scenes without this co-occurrence."
)


@dataclass(frozen=True)
class SeedResult:
    """Results of one seed: figures of all variants, seconds of all stages, folder of its files."""

    seed: int
    root: Path
    figures: dict[str, Figures]
    seconds: dict[str, float]


class Stages:
    """Prints and times the stages."""

    def __init__(self, total: int):
        self.seconds: dict[str, float] = {}
        self._total = total
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        begin = time.monotonic()
        print(f"[{len(self.seconds) + 1}/{self._total}, {begin - self._started:.0f} s] {what}", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)


def run_seed(root: Path, seed: int, recipe: Recipe) -> SeedResult:
    """Runs all stages for one seed; deletes `root` first."""
    from bpo.bootstrap.measure.command import run_measure
    from bpo.bootstrap.run import run_bootstrap
    from bpo.tools.demo.base import build_base_model
    from bpo.tools.demo.files import build_world

    if root.exists():
        shutil.rmtree(root)
    stages = Stages(total=4 + 2 * len(VARIANTS) + 1)
    with stages.stage("world", f"seed {seed}: generating the synthetic world"):
        world = build_world(root / "world", recipe.world(seed))
    with stages.stage("base", "training the base model (vision tower, then biased language model)"):
        build_base_model(root / "base", recipe.world(seed), recipe.base(seed))
    with stages.stage("bootstrap", "bootstrapping rejected answers from the base model"):
        run_bootstrap(recipe.bootstrap(root, world, seed))
    with stages.stage("measure", "measuring whether the rejected answers need the image"):
        run_measure(recipe.measure(root, world, seed))
    figures: dict[str, Figures] = {}
    with stages.stage("evaluate_base", "evaluating the base model"):
        figures["base"] = evaluate(root / "base", recipe, world)
    for variant in VARIANTS:
        with stages.stage(f"train_{variant.name}", f"training {variant.label}: {variant.description}"):
            train_variant(recipe.training(root, world, variant, seed), recipe)
        with stages.stage(f"evaluate_{variant.name}", f"evaluating {variant.label}"):
            figures[variant.name] = evaluate(root / variant.name / "model", recipe, world)
    return SeedResult(seed, root, figures, stages.seconds)


def train_variant(config: Config, recipe: Recipe) -> None:
    """Trains a variant with the deepspeed launcher and exports the merged model."""
    from bpo.checkpoint.export import run_export

    output = Path(config.train.output_dir)
    run_training(config, num_ranks=recipe.num_ranks)
    run_export(replace(config, export=ExportConfig(checkpoint=str(output), output=str(output / "model"))))
    shutil.rmtree(output / "checkpoints")  # the report needs only the merged model


def evaluate(model_dir: Path, recipe: Recipe, world: World) -> Figures:
    """CHAIR and POPE on the unbiased scenes; saves all answers to evaluation.json in the model directory."""
    from bpo.config.training import DataConfig, ModelConfig
    from bpo.data.encode import load_encoder
    from bpo.evaluation.run import evaluate_model
    from bpo.evaluation.suite import read_suite
    from bpo.model.load import load_model

    options = recipe.evaluation(world)
    config = Config(
        model=ModelConfig(path=str(model_dir), dtype="float32"),
        data=DataConfig(image_root=str(world.images)),
        evaluation=options,
    )
    results = evaluate_model(load_model(config.model), load_encoder(config), read_suite(options), options)
    tree = {"benchmarks": [result.to_json() for result in results]}
    (model_dir / "evaluation.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    chair, pope = (result.metrics for result in results)
    described = (chair[name] for name in ("chair_i", "chair_s", "recall"))
    asked = (pope[name] for name in ("accuracy", "adversarial/accuracy", "f1", "yes_ratio"))
    return Figures(*described, *asked)


def write_metrics(path: Path, results: list[SeedResult], versions: dict[str, str]) -> None:
    """Writes metrics.json: medians over the seeds by variant, figures and measures of each seed, seconds, versions."""
    names = list(results[0].figures)
    tree: dict[str, object] = {}
    for name in names:
        variant = _report_variant(name, results)
        tree[name] = {metric: variant.median(metric) for metric in METRICS}
    tree["seconds"] = results[0].seconds
    tree["versions"] = versions
    tree["seeds"] = {
        str(r.seed): {
            **{name: asdict(figures) for name, figures in r.figures.items()},
            "measures": {kind: _figures_of(of_type) for kind, of_type in _measures(r).items()},
            "seconds": r.seconds,
        }
        for r in results
    }
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _measures(result: SeedResult) -> dict[str, TypeMeasures]:
    return read_measures(result.root / "groups.jsonl")


def _figures_of(measures: TypeMeasures) -> dict[str, float | None]:
    """The main measures of a completion type; None for those that too few pairs allow."""
    blind, seeing = measures.blind, measures.seeing
    return {
        "text_accuracy": measures.accuracy,
        "blind_median_nats": blind.median if blind else None,
        "blind_share_above_zero": blind.share_above_zero if blind else None,
        "seeing_median_nats": seeing.median if seeing else None,
    }


def _definition(name: str) -> Variant:
    return next(v for v in (BASE, *VARIANTS) if v.name == name)


def _report_variant(name: str, results: list[SeedResult]) -> ReportVariant:
    definition = _definition(name)
    return ReportVariant(name, definition.label, definition.description, tuple(r.figures[name] for r in results))


def format_table(results: list[SeedResult]) -> str:
    """The final table of the demo: medians in percent, with the range if there are several seeds."""
    width = 24 if len(results) > 1 else 17
    lines = [" " * 20 + "".join(name.rjust(width) for name in METRICS)]
    for name in results[0].figures:
        variant = _report_variant(name, results)
        cells = []
        for metric in METRICS:
            values = sorted(100 * value for value in variant.values(metric))
            cell = f"{100 * variant.median(metric):.1f}"
            cells.append(cell + (f" ({values[0]:.1f}-{values[-1]:.1f})" if len(values) > 1 else ""))
        lines.append(name.ljust(20) + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bpo demo", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; reports medians and ranges (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}; it must be at least 1")
    logging.basicConfig(level=logging.WARNING)
    from bpo.tools.demo.environment import quiet_libraries, tested_versions, use_one_thread

    quiet_libraries()
    use_one_thread()
    started = time.monotonic()
    recipe = Recipe()
    results = []
    for seed in range(options.seed, options.seed + options.seeds):
        results.append(run_seed(options.output / f"seed-{seed}", seed, recipe))
        write_outputs(options.output, results, recipe, tested_versions())
    print(
        f"\nResults on {recipe.num_evaluation_scenes} unbiased scenes, in percent"
        f"{' (median and range over seeds)' if len(results) > 1 else ''}:\n"
    )
    print(format_table(results))
    print(f"\n{time.monotonic() - started:.0f} s. Figures: {options.output / 'metrics.json'}")
    print(f"Report: {(options.output / 'report.html').resolve()}")
    return 0


def write_outputs(output: Path, results: list[SeedResult], recipe: Recipe, versions: dict[str, str]) -> None:
    """Writes metrics.json and report.html of the completed seeds, after each seed."""
    write_metrics(output / "metrics.json", results, versions)
    first = results[0]
    names = list(first.figures)
    write_report(
        output / "report.html",
        ReportData(
            title=TITLE,
            explanation=EXPLANATION,
            seeds=tuple(r.seed for r in results),
            variants=tuple(_report_variant(name, results) for name in names),
            headline="bpo",
            curves=tuple(read_curves(v.name, first.root / v.name / "metrics.jsonl") for v in VARIANTS),
            measures=_measures(first),
            training_examples=training_examples(first.root, recipe),
            evaluation_examples=evaluation_examples(first.root),
            stage_seconds=first.seconds,
            versions=versions,
        ),
    )
