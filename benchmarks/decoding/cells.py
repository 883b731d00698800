"""One cell of the comparison of decodings: a model, answered with one decoding, for one seed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.methods.cells import Comparison, Seed, train_and_export
from bpo.config.decoding import CalibrationConfig, ContrastConfig
from bpo.config.evaluation import EvaluationConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.grid import score_grid, settings_of
from bpo.evaluation.results import flat_metrics, score_suite
from bpo.evaluation.run import answer_suite
from bpo.evaluation.suite import read_suite
from bpo.job.durable import write_durably
from bpo.model.decoding.cost import DecodingCost
from bpo.model.load import load_model
from bpo.tools.demo.recipe import VARIANTS

MODELS = ("base", "bpo")
DECODINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vdd none": {"decoding": "vdd", "contrast": ContrastConfig(views=["none"])},
    "vdd none+unk": {"decoding": "vdd", "contrast": ContrastConfig(views=["none", "unk"])},
    "vcd": {"decoding": "vcd"},
    # The form `shift` would choose the same of two labels.
    "calibration sample": {"decoding": "calibration", "calibration": CalibrationConfig(over="sample")},
    "calibration dataset": {"decoding": "calibration", "calibration": CalibrationConfig(over="dataset")},
    "grid": {"decoding": "grid"},
}
# Column -> metric of a suite of CHAIR and POPE.
FIGURES = {
    "CHAIR_i": "chair/chair_i",
    "CHAIR_s": "chair/chair_s",
    "recall": "chair/recall",
    "POPE accuracy": "pope/accuracy",
    "POPE F1": "pope/f1",
    "POPE yes": "pope/yes_ratio",
}


def cell_path(output: Path, model: str, decoding: str, seed: int) -> Path:
    return output / "decoding" / f"{model}.{decoding.replace(' ', '-')}.seed-{seed}.json"


def options_of(sizes: Comparison, seed: Seed, decoding: str) -> EvaluationConfig:
    return replace(sizes.evaluation(seed.world), **DECODINGS[decoding])


def model_of(sizes: Comparison, seed: Seed, name: str) -> Path:
    """The base model, or the one that the demo's variant `bpo` makes of it; trained if it is missing."""
    if name == "base":
        return seed.root / "base"
    kept = seed.root / "models" / f"demo-{name}"
    if not kept.exists():
        variant = replace(next(v for v in VARIANTS if v.name == name), name=f"run-demo-{name}")
        config = sizes.training(seed.root, seed.world, variant, seed.number)
        in_process = replace(
            config.train, ds_config="ds_configs/zero1.json", tensorboard=False, hang_timeout_seconds=0.0
        )
        run = Path(in_process.output_dir)
        shutil.rmtree(run, ignore_errors=True)
        train_and_export(replace(config, train=in_process), run / "model")
        kept.parent.mkdir(exist_ok=True)
        (run / "model").rename(kept)
        shutil.rmtree(run)
    return kept


def run_cell(output: Path, sizes: Comparison, seed: Seed, model: str, decoding: str) -> dict[str, Any]:
    """Answers CHAIR and POPE on the unbiased scenes; a finished cell with the same options is read again."""
    path, options = cell_path(output, model, decoding, seed.number), options_of(sizes, seed, decoding)
    about = {"model": model, "decoding": decoding, "seed": seed.number, "options": asdict(options)}
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known["options"] == json.loads(json.dumps(about["options"])):
            return known
    config = Config(
        model=ModelConfig(path=str(model_of(sizes, seed, model)), dtype="float32"),
        data=DataConfig(image_root=str(seed.world.images)),
        evaluation=options,
    )
    suite, journal, cost = read_suite(options), AnswerJournal(), DecodingCost()
    loaded, encoder = load_model(config.model), load_encoder(config)
    started = time.perf_counter()
    answer_suite(loaded, encoder, suite, options, journal, progress=False, cost=cost)
    cell = {**about, "seconds": round(time.perf_counter() - started, 2), "cost": cost.to_json()}
    if options.decoding == "grid":
        grid = score_grid(suite, journal, options)
        cell["grid"] = [result.to_json() for result in grid]
        # Of the half of the units that did not choose the setting; `metric` is the first of each benchmark.
        cell["metrics"] = {f"{result.benchmark}/{result.metric}": result.reported for result in grid}
        cell["plain"] = {f"{result.benchmark}/{result.metric}": result.base for result in grid}
        cell["runs"] = 1 + len(settings_of(options))
    else:
        cell["metrics"] = flat_metrics(score_suite(suite, journal, options))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(cell, indent=1) + "\n")
    return cell
