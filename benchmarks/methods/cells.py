"""One cell of the comparison: a method, trained with the demo's settings and evaluated, for one seed."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import bpo
from bpo.bootstrap.run import run_bootstrap
from bpo.checkpoint.export import run_export
from bpo.config.io import read_yaml
from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.training import Config, DataConfig, ExportConfig, ModelConfig
from bpo.data.encode import Dropped, EncodedGroup, load_encoder
from bpo.data.groups import GroupDataset
from bpo.evaluation.run import evaluate_model
from bpo.evaluation.suite import read_suite
from bpo.job.durable import replacing
from bpo.job.exits import JobError
from bpo.job.launch import Ranks
from bpo.losses.terms import resolve_terms
from bpo.model.load import load_model
from bpo.tools.demo.base import BaseConfig, build_base_model
from bpo.tools.demo.files import World, build_world
from bpo.tools.demo.methods import MethodGroups, data_of, write_method_groups
from bpo.tools.demo.recipe import Recipe, Variant
from bpo.train import train
from bpo.training import reference_pass

RECIPES = {path.stem: path for path in (Path(bpo.__file__).parent / "recipes" / "methods").glob("*.yaml")}
BASE = "base"
# As published, and with the mean negative log-likelihood per token of the preferred answers added, as the demo does.
PUBLISHED, WITH_NLL = "published", "with-nll"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison(Recipe):
    """Sizes of the comparison: those of the demo."""

    base_config: BaseConfig = BaseConfig()

    def base(self, seed: int) -> BaseConfig:
        return replace(self.base_config, seed=seed)


@dataclass(frozen=True)
class Seed:
    """World, base model and groups of one seed."""

    number: int
    root: Path
    world: World
    groups: MethodGroups


def loss_of(method: str) -> LossConfig:
    """The recipe's loss. Read without the parser of all options, which takes a second to build."""
    tree = read_yaml(RECIPES[method])["loss"]
    terms = [TermConfig(**term) for term in tree.pop("terms", ())]
    views = {name: ViewConfig(**view) for name, view in tree.pop("views", {}).items()}
    return LossConfig(**tree, terms=terms, views=views)


def has_likelihood(loss: LossConfig) -> bool:
    """Whether the method itself raises the likelihood of the preferred answers."""
    return any(t.definition.name in ("nll", "sft") and t.spec.pairs == "chosen" for t in resolve_terms(loss))


def columns_of(method: str) -> tuple[str, ...]:
    return (PUBLISHED,) if method == BASE or has_likelihood(loss_of(method)) else (PUBLISHED, WITH_NLL)


def with_likelihood(loss: LossConfig, weight: float) -> LossConfig:
    if not loss.terms:
        return replace(loss, chosen_nll_weight=weight)
    return replace(loss, terms=[*loss.terms, TermConfig(type="nll", name="likelihood", weight=weight)])


def cell_path(output: Path, method: str, column: str, seed: int) -> Path:
    return output / "cells" / f"{method}.{column}.seed-{seed}.json"


def cell_loss(sizes: Comparison, method: str, column: str) -> LossConfig:
    loss = loss_of(method)
    return loss if column == PUBLISHED else with_likelihood(loss, sizes.chosen_nll_weight)


def finished_cell(output: Path, sizes: Comparison, method: str, column: str, seed: int) -> dict[str, Any] | None:
    """The result of a cell, if there is one of the same loss."""
    path = cell_path(output, method, column, seed)
    if not path.exists():
        return None
    cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = method == BASE or cell["loss"] == asdict(cell_loss(sizes, method, column))
    return cell if same else None


def prepare(output: Path, sizes: Comparison, seed: int) -> Seed:
    """World, base model, bootstrapped groups and their further fields; finished parts are kept."""
    root = output / f"seed-{seed}"
    world = build_world(root / "world", sizes.world(seed), progress=False)
    if not (root / "base" / "processor_config.json").exists():
        build_base_model(root / "base", sizes.world(seed), sizes.base(seed))
    run_bootstrap(sizes.bootstrap(root, world, seed))
    groups = write_method_groups(root / "groups.jsonl", root / "methods", sizes.world(seed))
    return Seed(seed, root, world, groups)


def training_config(sizes: Comparison, seed: Seed, method: str, column: str, model: Path) -> Config:
    """The recipe's loss with the demo's optimisation, of all weights of the language model and the projector."""
    data = data_of(method)
    variant = Variant(name=f"run-{method}-{column}", label="", description="", completion_types=data.completion_types)
    config = sizes.training(seed.root, seed.world, variant, seed.number)
    return replace(
        config,
        model=replace(config.model, path=str(model)),
        data=replace(config.data, groups=str(data.path(seed.groups))),
        loss=cell_loss(sizes, method, column),
        train=replace(config.train, ds_config="ds_configs/zero1.json", tensorboard=False, hang_timeout_seconds=0.0),
    )


def run_cell(output: Path, sizes: Comparison, seed: Seed, method: str, column: str) -> dict[str, Any]:
    """Trains and evaluates a method, after the one whose model it starts from; finished cells are read again.

    A run that diverges is a result: its cell has `failed`, the reason, instead of figures.
    """
    path, kept = cell_path(output, method, column, seed.number), seed.root / "models" / method
    is_start = column == PUBLISHED and any(data_of(name).after == method for name in RECIPES)
    known = finished_cell(output, sizes, method, column, seed.number)
    if known is not None and (kept.exists() or not is_start or "failed" in known):
        return known
    started = time.monotonic()
    about: dict[str, Any] = {"method": method, "column": column, "seed": seed.number}
    if method == BASE:
        return _write(path, {**about, **evaluate(seed.root / "base", sizes, seed.world)})
    about["loss"] = asdict(cell_loss(sizes, method, column))
    before = data_of(method).after
    if before and "failed" in run_cell(output, sizes, seed, before, PUBLISHED):
        return _write(path, {**about, "failed": f"{before}, from which it starts, diverged"})
    config = training_config(
        sizes, seed, method, column, seed.root / "models" / before if before else seed.root / "base"
    )
    run = Path(config.train.output_dir)
    shutil.rmtree(run, ignore_errors=True)
    try:
        costs = train_and_export(config, run / "model")
    except JobError as error:
        logger.warning("%s, %s, seed %d: %s", method, column, seed.number, error)
        return _write(path, {**about, "failed": str(error)})
    found = evaluate(run / "model", sizes, seed.world)
    if is_start:
        kept.parent.mkdir(exist_ok=True)
        shutil.rmtree(kept, ignore_errors=True)
        (run / "model").rename(kept)
    shutil.rmtree(run)
    return _write(path, {**about, **found, **costs, "cell_seconds": round(time.monotonic() - started, 2)})


def _write(path: Path, cell: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(cell, indent=1) + "\n").encode())
    return cell


def train_and_export(config: Config, model: Path) -> dict[str, float]:
    """Trains in this process and writes the merged model; returns costs and the likelihood at the end.

    step_seconds: median; tokens_per_step: mean of the packed tokens; reference_seconds: of the reference pass, 0 for
    losses without a reference; nll_first, nll_last: mean negative log-likelihood per token of the preferred answers.
    """
    torch.manual_seed(config.train.seed)
    with _encoded_once(), _timed_reference() as reference_seconds:
        train(config, Ranks())
    output = Path(config.train.output_dir)
    run_export(replace(config, export=ExportConfig(checkpoint=str(output), output=str(model))))
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "steps": len(steps),
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "tokens_per_step": statistics.mean(step["step_seconds"] * step["tokens_per_second"] for step in steps),
        "reference_seconds": sum(reference_seconds),
        "nll_first": steps[0]["nll/chosen"],
        "nll_last": steps[-1]["nll/chosen"],
    }


@contextmanager
def _encoded_once() -> Iterator[None]:
    """Keeps encoded groups in memory: encoding takes longer than a step of the tiny model, and is not compared."""
    encode = GroupDataset.encode

    def once(dataset: GroupDataset, index: int) -> EncodedGroup | Dropped:
        known = dataset.__dict__.setdefault("encoded", {})
        if index not in known:
            known[index] = encode(dataset, index)
        group: EncodedGroup | Dropped = known[index]
        return group

    with mock.patch.object(GroupDataset, "encode", once):
        yield


@contextmanager
def _timed_reference() -> Iterator[list[float]]:
    """Collects the seconds of the reference passes of trainings inside."""
    seconds: list[float] = []

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return reference_pass.fill_reference_store(*arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    with mock.patch("bpo.train.fill_reference_store", timed):
        yield seconds


def evaluate(model: Path, sizes: Comparison, world: World) -> dict[str, float]:
    """CHAIR of the descriptions of the unbiased scenes."""
    options = replace(sizes.evaluation(world), pope_questions=[])
    config = Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(image_root=str(world.images)),
        evaluation=options,
    )
    (chair,) = evaluate_model(load_model(config.model), load_encoder(config), read_suite(options), options)
    return {name: chair.metrics[name] for name in ("chair_i", "chair_s", "recall")}
