"""The stages of the benchmark; each writes its files once and is skipped where they exist, so a killed run goes on."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.grounding.arms import (
    ARM_OF,
    FIRST_INJECTION_SEED,
    NUM_RECORDS,
    NUM_RECORDS_OF_INJECTION,
    Arm,
    Setting,
    bootstrap_config,
    sources_of_seed,
    training_config,
    write_lexicon,
)
from benchmarks.grounding.base import BaseConfig, build_base
from benchmarks.grounding.data import write_annotations, write_json
from benchmarks.grounding.evaluate import TEST, VALIDATION, Split, evaluate, figures
from benchmarks.grounding.tower import register
from benchmarks.grounding.world import WorldConfig
from bpo.bootstrap.completion_types import COMPLETION_TYPES
from bpo.bootstrap.run import run_bootstrap
from bpo.checkpoint.export import run_export
from bpo.config.measure import MeasureConfig
from bpo.config.training import ExportConfig
from bpo.job.durable import replacing
from bpo.job.run_record import save_config

# Annotations per seed: some sources refuse many, and the arms need the same records.
NUM_ANNOTATIONS, NUM_ANNOTATIONS_OF_INJECTION = 560, 400
WORLD = WorldConfig()


def make_base(root: Path) -> None:
    """The base model, and its evaluation."""
    folder = root / "base"
    if not (folder / "config.json").exists():
        build_base(folder, WORLD, BaseConfig())
    write_lexicon(root / "lexicon.yaml")
    for split in (VALIDATION, TEST):
        score(root, folder, root / "scores" / f"base-{split.name}.json", split, {"arm": "base"})


def make_negatives(root: Path, seed: int) -> None:
    """Annotations and negatives of all sources for one seed, and the groups that have one of each source.

    Raises:
        ValueError: Too few records have a negative of every source.
    """
    folder = root / f"seed-{seed}"
    if (folder / "groups.jsonl").exists():
        return
    register()
    is_injection = seed >= FIRST_INJECTION_SEED
    write_annotations(folder, WORLD, seed, NUM_ANNOTATIONS_OF_INJECTION if is_injection else NUM_ANNOTATIONS)
    run_bootstrap(bootstrap_config(root, seed))
    wanted = {COMPLETION_TYPES[source] for source in sources_of_seed(seed)}
    complete = []
    with (folder / "all.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if wanted <= {completion["type"] for completion in json.loads(line)["completions"]}:
                complete.append(line)
    needed = NUM_RECORDS_OF_INJECTION if is_injection else NUM_RECORDS
    if len(complete) < needed:
        raise ValueError(
            f"{folder / 'all.jsonl'}: {len(complete)} records have a negative of every source, "
            f"{needed} are needed; raise NUM_ANNOTATIONS"
        )
    with replacing(folder / "groups.jsonl") as file:
        for line in complete[:needed]:
            file.write(line.encode("utf-8"))


def run_arm(root: Path, arm: Arm, setting: Setting, seed: int, split: Split) -> dict[str, float]:
    """Trains an arm and evaluates it; returns `figures`, read again if the run is finished."""
    path = root / "scores" / f"{arm.name}-seed{seed}-{setting.name}-{split.name}.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8"))["figures"])
    register()
    from bpo.cli import main

    output = root / "runs" / f"{arm.name}-seed{seed}-{setting.name}"
    if not (output / "model").is_dir():
        config = training_config(root, arm, setting, seed, output)
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "requested.yaml")
        if main(["train", "--config", str(output / "requested.yaml"), "--train.resume", "true"]) != 0:
            raise RuntimeError(f"training failed: {output}")
        run_export(replace(config, export=ExportConfig(checkpoint=str(output), output=str(output / "model"))))
        shutil.rmtree(output / "checkpoints")
    about = {"arm": arm.name, "seed": seed, "setting": setting.name}
    rates = score(root, output / "model", path, split, about)
    if split is TEST:
        shutil.rmtree(output / "model")  # 270 MB
    return rates


def measure(root: Path) -> None:
    """`bpo measure` with the base model of the groups of the first seed, and of the first one with injected errors."""
    from bpo.bootstrap.measure.command import run_measure

    register()
    for seed in (0, FIRST_INJECTION_SEED):
        groups = root / f"seed-{seed}" / "groups.jsonl"
        if groups.exists() and not groups.with_name(f"{groups.name}.measures.json").exists():
            config = bootstrap_config(root, seed)
            data = replace(config.data, annotations="", groups=str(groups))
            run_measure(replace(config, data=data, measure=MeasureConfig(records=128, max_micro_batch_tokens=1024)))


def score(root: Path, model: Path, path: Path, split: Split, about: dict[str, Any]) -> dict[str, float]:
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8"))["figures"])
    started = time.monotonic()
    result = evaluate(model, root / "images", WORLD, split)
    rates = figures(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, "figures": rates, "seconds": round(time.monotonic() - started, 1), **result})
    return rates


def main(argv: list[str]) -> None:
    """One stage: `base ROOT`, `negatives ROOT SEED`, `measure ROOT` or `arm ROOT ARM SETTING SEED SPLIT`."""
    import torch

    torch.set_num_threads(1)
    stage, root = argv[0], Path(argv[1])
    if stage == "base":
        make_base(root)
    elif stage == "negatives":
        make_negatives(root, int(argv[2]))
    elif stage == "measure":
        measure(root)
    else:
        setting = Setting(*json.loads(argv[3]))
        print(run_arm(root, ARM_OF[argv[2]], setting, int(argv[4]), {s.name: s for s in (VALIDATION, TEST)}[argv[5]]))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
