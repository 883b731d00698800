"""Runs of SPA with extrapolated log-probs: `python -m tests.training.extrapolation_job DIR [RANKS]`.

DIR has a model `llava`, images and groups. Before each step the margins are computed again from whole logits; writes
DIR/observed.json: by run and step the margins [[expected, seen], ...]. Shape letters: N tokens, V vocabulary, P pairs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open

from bpo.config.training import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.engine import TrainingEngine
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.load import load_model
from bpo.records import GroupBatch
from bpo.train import train
from bpo.training import step as training
from tests.ranks import fork_ranks

BETA, EXTRAPOLATION = 0.5, 0.5
SPA = {"window": 1000, "quantile": 0.5}


def config_of(root: Path, name: str, stage: int, **options: float) -> Config:
    ds_config = root / f"stage{stage}.json"
    threshold = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage, **threshold}}))
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0),
        lora=LoraConfig(r=4, alpha=8, dropout=0.0),
        loss=LossConfig(type="spa", beta=BETA, options={**SPA, **options}),
        train=TrainConfig(
            output_dir=str(root / name),
            ds_config=str(ds_config),
            epochs=3,
            groups_per_step=100,
            max_micro_batch_tokens=200,
            lr=0.02,
            lr_schedule="constant",
            warmup_ratio=0.0,
            tensorboard=False,
            hang_timeout_seconds=0,
            reference_dir=str(root / "reference"),
        ),
    )


def configs(root: Path) -> dict[str, Config]:
    dpo = config_of(root, "dpo", 3, alpha=0.0)
    passes = config_of(root, "passes", 3, alpha=0.0, extrapolation=EXTRAPOLATION)
    judged = config_of(root, "judged", 2, alpha=0.5, extrapolation=EXTRAPOLATION, warmup_share=0.5)
    judged = replace(judged, trainable=TrainableConfig(language="full", lm_head="frozen"))
    judged.train.held_out_groups, judged.train.evaluate_every_steps = 2, 3
    return {"dpo": dpo, "passes": passes, "judged": judged}


class Observer:
    """Stands for `run_step`; the reference's logits are the policy's before its first step."""

    def __init__(self, head_VD: torch.Tensor):  # noqa: N803
        self.head_VD = head_VD
        self.reference: dict[str, torch.Tensor] = {}
        self.steps: list[list[list[float]]] = []

    def __call__(self, trainer: TrainingEngine, batches: Any, config: Config, *more: Any) -> Any:
        batches = list(batches)
        expected = [margin for batch in batches for margin in self._margins(trainer, batch)]
        state: Any = trainer.program.states["spa"]
        before = len(state.margins)
        sums = training.run_step(trainer, batches, config, *more)
        everyone = sorted(margin for rank in collectives.gather_from_ranks(expected) for margin in rank)
        self.steps.append([list(pair) for pair in zip(everyone, sorted([*state.margins][before:]), strict=True)])
        return sums

    def _margins(self, trainer: TrainingEngine, batch: GroupBatch) -> list[float]:
        inputs = batch.loss_inputs
        logits_NV = trainer.hidden_states(batch) @ self.head_VD.T
        cells = zip(batch.reference_keys, logits_NV.split(inputs.completion_starts_K1.diff().tolist()), strict=True)
        reference_NV = torch.cat([self.reference.setdefault(key, of_cell) for key, of_cell in cells])
        beyond_NV = (1 + EXTRAPOLATION) * logits_NV - EXTRAPOLATION * reference_NV
        if not trainer.program.extrapolation:
            beyond_NV = logits_NV
        logp_N = beyond_NV.log_softmax(1).gather(1, batch.target_N[:, None])[:, 0]
        assert inputs.reference is not None
        ratio_K = inputs.sequence_sum(logp_N - inputs.reference)
        margin_P = BETA * ratio_K[inputs.pairs_P2].diff(dim=1)[:, 0].neg()
        return [] if batch.is_filler else margin_P.tolist()


def run_cases(root: Path, ranks: Ranks) -> None:
    with safe_open(root / "llava" / "model.safetensors", "pt") as file:
        head_VD = next(file.get_tensor(name) for name in file.keys() if "lm_head" in name)  # noqa: SIM118
    observed = {}
    for name, config in configs(root).items():
        observer = Observer(head_VD)
        with mock.patch("bpo.train.run_step", observer):
            train(config, ranks)
        observed[name] = observer.steps
    if ranks.is_main:
        (root / "observed.json").write_text(json.dumps(observed))


def main() -> None:
    root = Path(sys.argv[1])
    load_model(ModelConfig(path=str(root / "llava")), for_training=True)  # imports what all ranks need
    fork_ranks(int(sys.argv[2]) if len(sys.argv) > 2 else 1, partial(run_cases, root))


if __name__ == "__main__":
    main()
