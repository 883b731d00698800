"""Runs with each way to encode images: `python -m tests.training.features_job DIR RANKS`.

DIR has a model `llava`, images and groups. Writes DIR/observed.json: by run the metrics of each step, the number of
images and tiles that the tower has seen on each rank, and a sum over the trained weights.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bpo.config.training import Config, DataConfig, LoraConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.config.vision import VisionConfig
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.load import load_model
from bpo.train import train
from bpo.training import step as training
from tests.ranks import fork_ranks

# By name of the run: ZeRO stage, `vision.encode`, `vision.cache`. `again` reads what `disk` has written.
RUNS = {
    "plain": (2, "micro_batch", "none"),
    "disk": (2, "auto", "disk"),
    "again": (2, "auto", "disk"),
    "zero3": (3, "step", "none"),
}


def config_of(root: Path, name: str) -> Config:
    stage, encode, cache = RUNS[name]
    ds_config = root / f"stage{stage}.json"
    threshold = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage, **threshold}}))
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        vision=VisionConfig(encode=encode, cache=cache, cache_dir=str(root / "features")),  # type: ignore[arg-type]
        trainable=TrainableConfig(projector="full"),
        lora=LoraConfig(r=4, alpha=8, dropout=0.0),
        train=TrainConfig(
            output_dir=str(root / name),
            ds_config=str(ds_config),
            epochs=2,
            groups_per_step=4,
            max_micro_batch_tokens=100,
            lr=0.01,
            lr_schedule="constant",
            warmup_ratio=0.0,
            tensorboard=False,
            hang_timeout_seconds=0,
        ),
    )


def observe(config: Config, ranks: Ranks) -> dict[str, Any]:
    seen = {"tiles": 0, "steps": []}
    trainers = []

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen["tiles"] += len(inputs[0])

    def run_step(trainer: Any, *more: Any) -> Any:
        seen["steps"].append(seen["tiles"])
        trainers.append(trainer)
        return training.run_step(trainer, *more)

    load = mock.patch("bpo.train.load_base", wraps=_counted(count))
    with mock.patch("bpo.train.run_step", run_step), load:
        train(config, ranks)
    weights = sum(float(flat.double().sum()) for flat in trainers[-1].master_weights)
    seen["steps"].append(seen["tiles"])
    return {"tiles": collectives.gather_from_ranks(seen["steps"]), "weights": collectives.gather_from_ranks(weights)}


def _counted(count: Any) -> Any:
    from bpo.model.load import load_base

    def load(*arguments: Any, **options: Any) -> Any:
        model = load_base(*arguments, **options)
        (embedding,) = [m for n, m in model.named_modules() if n.endswith("vision_tower.embeddings.patch_embedding")]
        embedding.register_forward_pre_hook(count)
        return model

    return load


def run_cases(root: Path, ranks: Ranks) -> None:
    observed = {}
    for name in RUNS:
        observed[name] = observe(config_of(root, name), ranks)
        lines = (root / name / "metrics.jsonl").read_text().splitlines() if ranks.is_main else []
        observed[name]["metrics"] = [json.loads(line) for line in lines]
    if ranks.is_main:
        (root / "observed.json").write_text(json.dumps(observed))


def main() -> None:
    root = Path(sys.argv[1])
    load_model(ModelConfig(path=str(root / "llava")), for_training=True)  # imports what all ranks need
    fork_ranks(int(sys.argv[2]), partial(run_cases, root))


if __name__ == "__main__":
    main()
