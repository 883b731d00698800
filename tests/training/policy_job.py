"""Runs that start from a LoRA adapter or have a reference of another model: `python -m tests.training.policy_job DIR`.

DIR has a model `llava` and groups.jsonl; each step takes all groups. Errors that runs must raise are in errors.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bpo.checkpoint.export import run_export
from bpo.config.training import Config, DataConfig, ExportConfig, LoraConfig, ModelConfig, TrainConfig
from bpo.job.launch import Ranks
from bpo.train import train
from tests.ranks import fork_ranks


def config_of(root: Path, name: str, model: str, **options: Any) -> Config:
    """A run of two steps; dropout is 0, so that a loss is a function of the weights."""
    zero = options.pop("ds_config", "ds_configs/zero2.json")
    return Config(
        model=ModelConfig(path=str(root / model), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "photos"), num_workers=0),
        lora=LoraConfig(r=4, alpha=8, dropout=0.0),
        train=TrainConfig(
            **{
                "output_dir": str(root / name),
                "ds_config": zero,
                "groups_per_step": 3,
                "max_steps": 2,
                "lr": 0.02,
                "lr_schedule": "constant",
                "tensorboard": False,
                **options,
            }
        ),
    )


def export(root: Path, run: str, model: str, output: str, form: str) -> None:
    config = config_of(root, run, model)
    config.export = ExportConfig(checkpoint=str(root / run), output=str(root / output), form=form)  # type: ignore[arg-type]
    run_export(config)


def runs(root: Path, ranks: Ranks) -> None:
    run = partial(config_of, root)
    train(run("first", "llava"), ranks)
    export(root, "first", "llava", "adapter", "adapter")
    train(run("second", "adapter", save_every_steps=1), ranks)
    shutil.copytree(root / "second", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000002")
    train(run("resumed", "adapter", save_every_steps=1, resume=True), ranks)
    export(root, "second", "adapter", "second-adapter", "adapter")
    export(root, "second", "adapter", "second-merged", "merged")
    train(run("partitioned", "adapter", ds_config=str(root / "stage3.json")), ranks)

    errors = {}
    shared = {"reference_dir": str(root / "reference")}
    third = run("third", "adapter", reference_model=str(root / "llava"), max_steps=1, **shared)
    for name, config in (
        ("incomplete", third),
        ("loss", run("x", "adapter", reference_only=True)),
        ("rank", run("x", "adapter")),
    ):
        config.loss.type = "simpo" if name == "loss" else "sigmoid"
        config.lora.r = 8 if name == "rank" else 4
        try:
            train(config, ranks)
        except Exception as error:
            errors[name] = str(error)
    train(run("third", "llava", reference_only=True, **shared), ranks)
    errors["checkpoints"] = str(list((root / "third").glob("checkpoints/*")))
    train(third, ranks)
    (root / "errors.json").write_text(json.dumps(errors))


def main() -> None:
    root = Path(sys.argv[1])
    stage3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (root / "stage3.json").write_text(json.dumps(stage3))
    fork_ranks(int((sys.argv[2:] or ["1"])[0]), partial(runs, root))


if __name__ == "__main__":
    main()
