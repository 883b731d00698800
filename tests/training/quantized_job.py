"""Runs on quantised weights: `python -m tests.training.quantized_job DIR KIND`.

DIR has a model `llava`, images and groups. A run of four steps, and one that is stopped after two and continued; writes
DIR/refused.json: how ZeRO-3 is refused.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from bpo.config.training import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from bpo.job.launch import Ranks
from bpo.model.load import load_model
from bpo.train import train
from tests.ranks import fork_ranks


def config_of(root: Path, kind: str, name: str, **options: object) -> Config:
    given = {"ds_config": "ds_configs/zero2.json", "epochs": 1, "groups_per_step": 4, "max_micro_batch_tokens": 300}
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32", quantization=kind),  # type: ignore[arg-type]
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        lora=LoraConfig(r=4, alpha=8, dropout=0.1),
        train=TrainConfig(
            output_dir=str(root / name),
            **{**given, "lr": 5e-3, "save_every_steps": 2, "tensorboard": False, "hang_timeout_seconds": 0, **options},  # type: ignore[arg-type]
        ),
    )


def run_cases(root: Path, kind: str, ranks: Ranks) -> None:
    whole = config_of(root, kind, "whole")
    train(whole, ranks)
    part = config_of(root, kind, "part")
    # Ends as an interrupted run would: its plan is that of four steps.
    (root / "part" / "checkpoints").mkdir(parents=True)
    (root / "whole" / "checkpoints" / "step-00000002").rename(root / "part" / "checkpoints" / "step-00000002")
    train(replace(part, train=replace(part.train, resume=True, reference_dir=str(root / "whole/reference"))), ranks)
    try:
        train(config_of(root, kind, "partitioned", ds_config="ds_configs/zero3.json"), ranks)
    except ValueError as error:
        (root / "refused.json").write_text(json.dumps(str(error)))


def main() -> None:
    root, kind = Path(sys.argv[1]), sys.argv[2]
    load_model(ModelConfig(path=str(root / "llava")), for_training=True)  # imports what all ranks need
    fork_ranks(1, partial(run_cases, root, kind))


if __name__ == "__main__":
    main()
