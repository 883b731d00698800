"""Counts the forward passes of runs with several losses, in one process: `view_cost_worker.py DIR`.

Writes DIR/passes.json: of each run, calls of the language model before the first step; of each step, its micro-batches,
calls of the language model and images through the vision tower. Starting a process costs more than a run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bpo import engine
from bpo import train as training
from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.training import Config, DataConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.data.families import family_of
from bpo.job import collectives
from bpo.job.launch import Ranks

VIEWS = {"crop": ViewConfig(type="crop"), "noise": ViewConfig(type="noise")}
# Views, anchors, a likelihood, weights by the policy, tokens of another view.
TERMS = [
    TermConfig(weighting="wpo"),
    TermConfig(name="image", pairs="image", against="crop"),
    TermConfig(name="anchor", pairs="chosen"),
    TermConfig(type="nll"),
    TermConfig(name="second", pairs="argmax", against="noise"),
]
NUM_GROUPS = 4
ONE, SEVERAL = 100_000, 400
# A loss and the tokens of a micro-batch.
RUNS = {
    "dpo": (LossConfig(), ONE),
    "unused views": (LossConfig(views=VIEWS), ONE),
    "terms": (LossConfig(terms=TERMS, views=VIEWS), ONE),
    "terms, divided": (LossConfig(terms=TERMS, views=VIEWS), SEVERAL),
    "across groups": (LossConfig(terms=[*TERMS, TermConfig(type="rpo")], views=VIEWS), ONE),
    "across groups, divided": (LossConfig(terms=[*TERMS, TermConfig(type="rpo")], views=VIEWS), SEVERAL),
    "simpo": (LossConfig(type="simpo"), ONE),
    "sft": (LossConfig(type="sft"), ONE),
}


def config_of(root: Path, name: str) -> Config:
    loss, max_tokens = RUNS[name]
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        trainable=TrainableConfig(language="full"),
        loss=loss,
        train=TrainConfig(
            output_dir=str(root / "runs" / name),
            ds_config="ds_configs/zero1.json",
            groups_per_step=NUM_GROUPS,
            max_micro_batch_tokens=max_tokens,
            max_steps=1,
            tensorboard=False,
            hang_timeout_seconds=0,
        ),
    )


class Passes:
    """Counts calls of the models that training loads, and what a step took of them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.steps: list[dict[str, int]] = []
        self.before_steps = 0
        self._load, self._run_step = training.load_base, training.run_step

    def load(self, *args: Any, **kwargs: Any) -> Any:
        model = self._load(*args, **kwargs)
        family = family_of(model.config)
        model.get_submodule(family.language_module).register_forward_pre_hook(self._count_call)
        model.get_submodule(family.vision_module).register_forward_pre_hook(self._count_images, with_kwargs=True)
        return model

    def _count_call(self, *_: Any) -> None:
        self.calls["language"] += 1

    def _count_images(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        self.calls["images"] += len(pixels)

    def run_step(self, trainer: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.steps:
            self.before_steps = self.calls["language"]
        before = Counter(self.calls)
        sums = self._run_step(trainer, batches, *args, **kwargs)
        self.steps.append({"micro_batches": len(batches), **(self.calls - before)})
        return sums


def main() -> None:
    root, ranks = Path(sys.argv[1]), Ranks()
    engine.init_distributed(ranks)
    load, run_step, results = training.load_base, training.run_step, {}
    for name in RUNS:
        training.load_base, training.run_step = load, run_step
        passes = Passes()
        training.load_base, training.run_step = passes.load, passes.run_step
        torch.manual_seed(0)
        training.train(config_of(root, name), ranks)
        results[name] = {"before_steps": passes.before_steps, "steps": passes.steps}
    (root / "passes.json").write_text(json.dumps(results))
    collectives.shut_down()


if __name__ == "__main__":
    main()
