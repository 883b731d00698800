"""Runs with evaluations under ZeRO-3 on two ranks and ZeRO-1 on one: `python -m tests.training.evaluation_job DIR`.

DIR has a model `llava`, images, groups, instances.json and suite.yaml. Each run leaves its metrics, and what it
answered in answers.jsonl; `resumed` continues `evaluated` as a kill after step 4 leaves it.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bpo.config.training import Config, DataConfig, EvaluationConfig, LoraConfig, LossConfig, ModelConfig, TrainConfig
from bpo.evaluation.results import score_benchmark
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.load import load_model
from bpo.train import train
from tests.ranks import fork_ranks

EVERY = 2
HELD_OUT = 4
BEST = "eval/loss"


def config_of(root: Path, name: str, stage: int = 3, **options: Any) -> Config:
    """Six steps of four groups; dropout makes losses depend on the state of the random generator."""
    ds_config = root / f"stage{stage}.json"
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        lora=LoraConfig(r=4, alpha=8, dropout=0.2),
        loss=LossConfig(chosen_nll_weight=0.1),
        train=TrainConfig(
            output_dir=str(root / name),
            ds_config=str(ds_config),
            groups_per_step=4,
            max_micro_batch_tokens=300,
            lr=5e-3,
            save_every_steps=EVERY,
            held_out_groups=HELD_OUT,
            tensorboard=False,
            **options,
        ),
    )


def evaluated(root: Path, name: str, stage: int = 3, **options: Any) -> Config:
    config = config_of(root, name, stage, evaluate_every_steps=EVERY, evaluation_images=0, keep_best=BEST, **options)
    return replace(config, evaluation=EvaluationConfig(suite=str(root / "suite.yaml"), batch_size=3))


def run(config: Config, ranks: Ranks) -> None:
    output = Path(config.train.output_dir)

    def score(benchmark: Any, answers: list[str]) -> Any:
        if any(answers):  # not the names of metrics
            with (output / "answers.jsonl").open("a") as file:
                file.write(json.dumps({"benchmark": benchmark.name, "answers": list(answers)}) + "\n")
        return score_benchmark(benchmark, answers)

    with mock.patch("bpo.training.evaluation.score_benchmark", score):
        train(config, ranks)


def two_ranks(root: Path, ranks: Ranks) -> None:
    run(config_of(root, "plain"), ranks)
    run(evaluated(root, "evaluated"), ranks)
    if ranks.is_main:
        shutil.copytree(root / "evaluated", root / "resumed")
        shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000006")
    collectives.barrier()
    run(evaluated(root, "resumed", resume=True), ranks)


def one_rank(root: Path, ranks: Ranks) -> None:
    run(evaluated(root, "alone", stage=1), ranks)


def main() -> None:
    root = Path(sys.argv[1])
    load_model(config_of(root, "").model)  # imports what all ranks need
    fork_ranks(2, partial(two_ranks, root))
    fork_ranks(1, partial(one_rank, root))


if __name__ == "__main__":
    main()
