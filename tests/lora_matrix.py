"""First-step gradients of adapters on two ranks: `lora_matrix.py DIR CASE...`.

A case is STAGE:KERNEL[:CHECKPOINTING[:DROPOUT[:VARIANT]]], for instance 3:addmm:full. Writes DIR/CASE.pt: what
`gradient_matrix.first_step` returns, tokens generated before and after the step, and how many weights ZeRO-3 had left
gathered after each.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gradient_matrix
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from ranks import fork_ranks

from bpo.config.training import Config, LoraConfig, TrainableConfig
from bpo.engine import TrainingEngine
from bpo.job.launch import Ranks
from bpo.model import recompute
from bpo.model.levers import lora
from bpo.model.levers.choice import Lever
from bpo.model.load import load_resolved, resolve_model
from bpo.model.trainable import prepare_trainable


def config_of(root: Path, case: str) -> Config:
    words = case.split(":")
    stage, kernel, checkpointing, dropout, variant = words + ["", "", "none", "0", "lora"][len(words) :]
    config = gradient_matrix.config_of(root, f"llava:{stage}:300:{checkpointing}")
    config.train.output_dir = str(root / f"{kernel}-{variant}")  # one reference store per rounding
    config.trainable = TrainableConfig(projector="frozen")
    config.lora = LoraConfig(r=3, alpha=6, dropout=float(dropout), kernel=kernel, variant=variant)  # type: ignore[arg-type]
    return config


def prepare(model: Any, family: Any, config: Config) -> None:
    """As training does, with an adapter that is not zero."""
    prepare_trainable(model, family, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    lora.install(model, family, config, Lever(config.lora.kernel, ""))


class Observed(TrainingEngine):
    """Generates before the first forward pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tokens = [self.generate()]
        self.gathered = [self.num_gathered()]
        engines.append(self)

    def generate(self) -> list[list[int]]:
        with self.generating() as model:
            return model.generate(torch.arange(5, 12)[None], max_new_tokens=5, do_sample=False).tolist()

    def num_gathered(self) -> int:
        status = [getattr(p, "ds_status", None) for p in self.policy.parameters()]
        return sum(one == ZeroParamStatus.AVAILABLE for one in status)


engines: list[Observed] = []


def run_cases(root: Path, cases: list[str], ranks: Ranks) -> None:
    recompute.CHEAP_INNER = 2  # tiny layers count as large ones
    for case in cases:
        with (
            mock.patch("gradient_matrix.prepare_trainable", prepare),
            mock.patch("bpo.engine.TrainingEngine", Observed),
        ):
            result = gradient_matrix.first_step(config_of(root, case), ranks)
        engine = engines.pop()
        engine.gathered.append(engine.num_gathered())
        engine.tokens.append(engine.generate())
        engine.gathered.append(engine.num_gathered())
        if ranks.is_main:
            torch.save(result | {"tokens": engine.tokens, "gathered": engine.gathered}, root / f"{case}.pt")


def main() -> None:
    root, *cases = sys.argv[1:]
    load_resolved(resolve_model(config_of(Path(root), cases[0]).model))  # imports what all ranks need
    import peft  # noqa: F401

    fork_ranks(2, partial(run_cases, Path(root), cases))


if __name__ == "__main__":
    main()
