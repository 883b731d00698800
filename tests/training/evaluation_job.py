"""Runs with evaluations under ZeRO-3 on two ranks and ZeRO-1 on one: `python -m tests.training.evaluation_job DIR`.

`write_inputs` prepares DIR. Each run leaves its metrics, and what it answered in answers.jsonl; `resumed` continues
`evaluated` as a kill after step 2 leaves it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bpo.config.training import Config, DataConfig, EvaluationConfig, LoraConfig, LossConfig, ModelConfig, TrainConfig
from bpo.evaluation.benchmark import Benchmark, BenchmarkOptions, Question, Scores, Sums
from bpo.evaluation.benchmarks.registry import BENCHMARKS
from bpo.evaluation.results import score_benchmark
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.generate import generate_answers
from bpo.model.load import load_model
from bpo.train import train
from tests.ranks import fork_ranks

NUM_IMAGES = 5
SUITE = """\
benchmarks:
  - {{type: chair, instances: {0}/instances.json, max_new_tokens: 8}}
  - {{type: pope, questions: [{0}/coco_pope_random.json], max_new_tokens: 3}}
  - {{type: blind, max_new_tokens: 4}}
"""


class Blind(Benchmark):
    """Questions without an image, for which ranks under ZeRO-3 must all leave out the vision tower."""

    @classmethod
    def read(cls, options: BenchmarkOptions) -> Blind:
        return cls(options=options, questions=tuple(Question(id=text, image="", text=text) for text in "abc"))

    def score(self, answers: list[str]) -> Scores:
        return Scores(tuple((q.id, {"letters": len(a)}) for q, a in zip(self.questions, answers, strict=True)), ())

    @staticmethod
    def metrics(sums: Sums) -> dict[str, np.ndarray]:
        return {"letters": sums["letters"]}


BLIND = mock.patch.dict(BENCHMARKS, blind=Blind)


def write_inputs(root: Path) -> None:
    """DeepSpeed files, CHAIR and POPE files about the first images, and the suite."""
    for zero in ({"stage": 1}, {"stage": 3, "stage3_param_persistence_threshold": 0}):
        (root / f"stage{zero['stage']}.json").write_text(json.dumps({"zero_optimization": zero}))
    objects = ["dog", "cat", "tree", "car"]
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(NUM_IMAGES)]
    seen = [{"image_id": i, "category_id": i % 4} for i in range(NUM_IMAGES)]
    categories = [{"id": k, "name": name} for k, name in enumerate(objects)]
    instances = {"images": images, "annotations": seen, "categories": categories}
    (root / "instances.json").write_text(json.dumps(instances))
    asked = [{"image": f"{i}.png", "text": f"Is there a {objects[i]} in the image?", "label": "yes"} for i in range(2)]
    lines = [json.dumps({"question_id": i, **question}) for i, question in enumerate(asked)]
    (root / "coco_pope_random.json").write_text("\n".join(lines))
    (root / "suite.yaml").write_text(SUITE.format(root))


def config_of(root: Path, name: str, stage: int = 3, **options: Any) -> Config:
    """Three steps of four groups; dropout makes losses depend on the state of the random generator."""
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        lora=LoraConfig(r=4, alpha=8, dropout=0.2),
        loss=LossConfig(chosen_nll_weight=0.1),
        train=TrainConfig(
            output_dir=str(root / name),
            ds_config=str(root / f"stage{stage}.json"),
            epochs=1,
            groups_per_step=4,
            max_micro_batch_tokens=300,
            lr=5e-3,
            save_every_steps=2,
            held_out_groups=4,
            tensorboard=False,
            **options,
        ),
    )


def evaluated(root: Path, name: str, stage: int = 3, **options: Any) -> Config:
    options = {"evaluate_every_steps": 2, "evaluation_images": 0, "keep_best": "eval/loss", **options}
    config = config_of(root, name, stage, **options)
    return replace(config, evaluation=EvaluationConfig(suite=str(root / "suite.yaml"), batch_size=2))


def run(config: Config, ranks: Ranks) -> None:
    def score(benchmark: Benchmark, answers: list[str]) -> Any:
        with (Path(config.train.output_dir) / "answers.jsonl").open("a") as file:
            file.write(json.dumps({"benchmark": benchmark.name, "answers": answers}) + "\n")
        return score_benchmark(benchmark, answers)

    def generate(model: Any, *arguments: Any, **options: Any) -> list[str]:
        assert not any(module.training for module in model.modules())  # no dropout
        return generate_answers(model, *arguments, **options)

    patches = {"evaluation.score_benchmark": score, "answering.generate_answers": generate}
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(f"bpo.training.{name}", replacement))
        stack.enter_context(BLIND)
        train(config, ranks)


def two_ranks(root: Path, ranks: Ranks) -> None:
    run(config_of(root, "plain"), ranks)
    run(evaluated(root, "evaluated"), ranks)
    if ranks.is_main:
        shutil.copytree(root / "evaluated", root / "resumed")
        shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000003")
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
