"""Prompt embeddings of two ranks under ZeRO-3: `python -m tests.training.embedding_job DIR`.

DIR has a model `llava`, a sentence encoder `bert`, images and groups. Writes DIR/vectors.pt: by kind of embedding and
key the vectors, from a run whose reference pass comes first and whose first step comes after.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

from bpo import engine
from bpo.config.training import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from bpo.data.encode import load_encoder
from bpo.job import collectives
from bpo.job.launch import Ranks
from bpo.model.load import load_resolved, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.training.batches import training_batches
from bpo.training.embeddings import fill_embedding_store
from bpo.training.measure import measure_groups
from bpo.training.metrics import step_metrics
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from bpo.training.step import run_step
from tests.ranks import fork_ranks

KINDS = ("model", "bert")


def config_of(root: Path, kind: str) -> Config:
    ds_config = root / "stage3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(
            groups=str(root / "groups.jsonl"), image_root=str(root / "images"), num_workers=0, text_only="keep"
        ),
        loss=LossConfig(type="rpo", prompt_embedding=kind if kind == "model" else str(root / kind)),
        train=TrainConfig(
            output_dir=str(root / f"run-{kind}"),
            ds_config=str(ds_config),
            groups_per_step=10**6,
            epochs=1,
            max_micro_batch_tokens=100,
            reference_micro_batch_tokens=1,
        ),
    )


def run_case(root: Path, kind: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    config = config_of(root, kind)
    resolved = resolve_model(config.model, for_training=True)
    encoder = load_encoder(config, resolved.config)
    data = measure_groups(config, encoder, ranks, collectives.gather_from_ranks)
    (step,) = plan_training(config.train, data, ranks)
    settings = engine.deepspeed_config(config.train, torch.float32, len(step.micro_batches[0]))
    with engine.partitioned_loading(settings):
        model = load_resolved(resolved)
    prepare_trainable(model, encoder.family, config)
    trainer = engine.TrainingEngine(PolicyModel(model), encoder.family, config, settings, ranks)
    store = fill_reference_store(config, resolved, trainer, data)
    embeddings = fill_embedding_store(config, resolved, trainer, data)
    (batches,) = training_batches(config.data, data, [step], store, trainer)
    sums = run_step(trainer, batches, config, data.num_pairs(step.groups), 0, embeddings)
    metrics = step_metrics(trainer.sum_over_ranks(sums.flat()), trainer.program)
    keys = {data.dataset.groups[index].id: data.measured[g].reference_key for g, index in enumerate(data.usable)}
    vectors = {name: embeddings.store.get(key) for name, key in keys.items()}
    return {**vectors, "loss": torch.tensor(metrics["loss"])}


def run_cases(root: Path, ranks: Ranks) -> None:
    results = {kind: run_case(root, kind, ranks) for kind in KINDS}
    if ranks.is_main:
        torch.save(results, root / "vectors.pt")


def main() -> None:
    root = Path(sys.argv[1])
    load_resolved(resolve_model(config_of(root, KINDS[0]).model))  # imports what all ranks need
    fork_ranks(2, partial(run_cases, root))


if __name__ == "__main__":
    main()
