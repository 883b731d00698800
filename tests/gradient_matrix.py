"""First-step gradients of many divisions of one batch: `gradient_matrix.py DIR NUM_RANKS:CASE...`.

A case is MODEL:STAGE:TOKENS[:CHECKPOINTING[:LOSS]], for instance llava:3:300 or llava:3:300:none:terms. TOKENS is the
limit of a micro-batch, or how many of the groups of DIR/pairs.jsonl each micro-batch packs, such as =1+3. Writes
DIR/N-CASE.pt: the loss, every gradient in full, which groups the micro-batches of each rank packed, and in which of
them an image stood in for none. Starting a process costs more than a case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from ranks import fork_ranks

from bpo import engine
from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.training import Config, DataConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.data.encode import load_encoder
from bpo.data.schedule import PlannedStep
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model import recompute
from bpo.model.load import load_resolved, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.training.batches import training_batches
from bpo.training.measure import measure_groups
from bpo.training.metrics import step_metrics
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from bpo.training.step import run_step

# Policy and reference differ, so that every pair has a different loss and gradient.
REFERENCE_SCALE = 0.9


VIEWS = {"crop": ViewConfig(type="crop"), "noise": ViewConfig(type="noise", step=700)}
LOSSES = {
    "": LossConfig(beta=0.5, chosen_nll_weight=0.1),
    # One call of the kernels: pairs of two views, anchors, betas and weights of their own.
    "mdpo": LossConfig(
        beta=0.5,
        terms=[
            TermConfig(),
            TermConfig(name="image", pairs="image", against="crop", beta=0.3, weight=0.7),
            TermConfig(name="anchor", pairs="chosen", weight=0.4),
        ],
        views=VIEWS,
    ),
    # Everything that the kernels do not compute, with pairs across the groups of the step.
    "terms": LossConfig(
        beta=0.5,
        terms=[
            TermConfig(weight=0.8),
            TermConfig(name="image", pairs="image", against="crop", weight=0.5, beta=0.3),
            TermConfig(name="changed", token_weights="changed", length="mean", weight=0.4),
            TermConfig(type="rpo_diagonal", weight=0.7),
            TermConfig(name="second", pairs="argmax", against="noise", weight=0.3),
            TermConfig(type="nll", weight=0.1),
        ],
        views=VIEWS,
    ),
}


def config_of(root: Path, case: str) -> Config:
    words = case.split(":")
    model, stage, max_tokens, checkpointing, loss = words + ["0", "1", "none", ""][len(words) - 1 :]
    ds_config = root / f"stage{stage}.json"
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    return Config(
        model=ModelConfig(path=str(root / model), dtype="float32", gradient_checkpointing=checkpointing),
        data=DataConfig(
            groups=str(root / ("pairs.jsonl" if max_tokens.startswith("=") else "groups.jsonl")),
            image_root=str(root / "images"),
            num_workers=0,
            text_only="drop" if loss else "keep",
        ),
        trainable=TrainableConfig(language="full", vision="full"),
        loss=LOSSES[loss],
        train=TrainConfig(
            output_dir=str(root / model),  # one reference store per model
            ds_config=str(ds_config),
            groups_per_step=10**6,
            epochs=1,
            max_micro_batch_tokens=10**6 if max_tokens.startswith("=") else int(max_tokens),
        ),
    )


def packed_as(step: PlannedStep, packing: str, num_ranks: int) -> PlannedStep:
    """The step with micro-batches of these sizes, such as =1+3, dealt to the ranks; one without any gets a filler."""
    groups, bins = sorted(step.groups), []
    for size in map(int, packing[1:].split("+")):
        bins.append(tuple(groups[:size]))
        groups = groups[size:]
    assert not groups
    count = -(-len(bins) // num_ranks)
    dealt = [bins[rank * count : (rank + 1) * count] for rank in range(num_ranks)]
    return replace(
        step,
        micro_batches=tuple(tuple([*own, *[bins[0][:1]] * (count - len(own))]) for own in dealt),
        is_filler=tuple((False,) * len(own) + (True,) * (count - len(own)) for own in dealt),
    )


def first_step(config: Config, ranks: Ranks, packing: str = "") -> dict[str, Any]:
    resolved = resolve_model(config.model, for_training=True)
    encoder = load_encoder(config, resolved.config)
    data = measure_groups(config, encoder, ranks, collectives.gather_from_ranks)
    (step,) = plan_training(config.train, data, ranks)
    if packing:
        step = packed_as(step, packing, ranks.world_size)
    settings = engine.deepspeed_config(config.train, torch.float32, len(step.micro_batches[0]))
    with engine.partitioned_loading(settings):
        model = load_resolved(resolved)
    prepare_trainable(model, encoder.family, config)
    trainer = engine.TrainingEngine(PolicyModel(model), encoder.family, config, settings, ranks)
    store = fill_reference_store(config, resolved, trainer, data)
    (batches,) = training_batches(config.data, data, [step], store, trainer)
    batches = [batch.with_reference(REFERENCE_SCALE * batch.loss_inputs.reference) for batch in batches]
    num_stand_ins = [len(batch.layout.prefix_spans) - len(batch.group_ids) for batch in batches]
    packed = [list(batch.group_ids) for batch in batches if not batch.is_filler]
    sums = run_step(trainer, batches, config, data.num_pairs(step.groups), step=1)
    return {
        "loss": step_metrics(trainer.sum_over_ranks(sums.flat()), trainer.program)["loss"],
        "gradients": {name: safe_get_full_grad(p) for name, p in trainer.policy.model.named_parameters()},
        "packed": collectives.gather_from_ranks(packed),
        "stand_ins": collectives.gather_from_ranks(num_stand_ins),
    }


def run_cases(root: Path, cases: list[str], ranks: Ranks) -> None:
    recompute.CHEAP_INNER = 2  # tiny layers count as large ones
    for case in cases:
        tokens = case.split(":")[2]
        result = first_step(config_of(root, case), ranks, tokens if tokens.startswith("=") else "")
        if ranks.is_main:
            torch.save(result, root / f"{ranks.world_size}-{case}.pt")


def main() -> None:
    root, *words = sys.argv[1:]
    by_ranks: dict[int, list[str]] = {}
    for word in words:
        num_ranks, case = word.split(":", 1)
        by_ranks.setdefault(int(num_ranks), []).append(case)
    load_resolved(resolve_model(config_of(Path(root), words[0].split(":", 1)[1]).model))  # imports what all ranks need
    for num_ranks, cases in by_ranks.items():
        fork_ranks(num_ranks, partial(run_cases, Path(root), cases))


if __name__ == "__main__":
    main()
