"""The bpo provider of `bpo bench step`: calls the functions of `bpo/train.py` in the same order for one step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from bpo import engine
from bpo.data.encode import load_encoder
from bpo.engine import TrainingEngine
from bpo.job import collectives
from bpo.job.launch import Ranks, pick_device
from bpo.model.levers.install import choose_levers, install_levers
from bpo.model.load import load_base, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch
from bpo.tools.bench.case import StepCase, pair_label, set_adapter
from bpo.tools.bench.meter import Meter
from bpo.tools.bench.workers import Session
from bpo.training.batches import training_batches
from bpo.training.flops import model_flops
from bpo.training.measure import measure_groups
from bpo.training.metrics import step_metrics
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from bpo.training.step import run_step
from bpo_kernels.dispatch import chosen_implementation

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Disables the adapters, which leaves the base model: the policy before its first step if B starts at zero."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def serve(case: StepCase, session: Session, provider: str) -> None:
    """Creates model, engine, store and batch as training does, then runs a step for each command."""
    config = case.config()
    ranks = Ranks()
    engine.init_distributed(ranks)
    resolved = resolve_model(config.model, pick_device(ranks), for_training=True)
    encoder = load_encoder(config, resolved.config)
    data = measure_groups(config, encoder, ranks, collectives.gather_from_ranks)
    (step,) = plan_training(config.train, data, ranks)
    settings = engine.deepspeed_config(config.train, resolved.dtype, len(step.micro_batches[0]))
    model = load_base(resolved)
    prepare_trainable(model, encoder.family, config)
    install_levers(model, encoder.family, config, choose_levers(config, resolved))
    adapter = set_adapter(model, resolved.dtype)
    trainer = TrainingEngine(PolicyModel(model), encoder.family, config, settings, ranks)
    meter = Meter(model, encoder.family.language_module, encoder.family.vision_module, trainer.device)
    with without_adapter(model):
        store = fill_reference_store(config, resolved, trainer, data)
    batches = list(next(training_batches(config.data, data, [step], store, trainer)))
    outputs: list[Any] = []
    trainer.policy.register_forward_hook(lambda module, args, output: outputs.append(output))
    useful = model_flops(model, encoder.family)
    meter.release()
    session.ready(
        adapter=adapter,
        kernels=chosen_implementation(torch.empty(0, device=trainer.device)),
        useful_flops=sum(useful.step(batch.useful_work) for batch in batches),
    )
    while (command := session.receive()).what != "stop":
        outputs.clear()
        result: dict[str, Any] = {}
        with meter.measure(command.kind, result):
            if command.what == "reference":
                for batch in batches:
                    trainer.reference_logp(batch)
            else:
                sums = run_step(trainer, batches, config, case.num_pairs, step=1)
                flat = trainer.sum_over_ranks(sums.flat())
                result["grad_norm"] = trainer.step(1.0)
        if command.what == "step":
            result["loss"] = step_metrics(flat, trainer.program)["loss"]
            if command.kind == "plain":
                result["pairs"] = _pairs(batches, outputs)
        outputs.clear()
        if not command.keep_cache:
            meter.release()
        session.answer(result)
    collectives.shut_down()


def _pairs(batches: list[GroupBatch], outputs: list[Any]) -> dict[str, dict[str, float]]:
    """Summed policy and reference log-probs of both completions, by pair."""
    pairs: dict[str, dict[str, float]] = {}
    for batch, (_, logp_N, _, _) in zip(batches, outputs, strict=True):
        assert batch.loss_inputs.reference is not None
        owner_N = batch.loss_inputs.completion_of_token_N.cpu()
        zeros_C = torch.zeros(batch.loss_inputs.num_completions, dtype=torch.float64)
        policy_C = zeros_C.index_add(0, owner_N, logp_N.detach().double().cpu())
        reference_C = zeros_C.index_add(0, owner_N, batch.loss_inputs.reference.double().cpu())
        for i, j in batch.loss_inputs.pairs_P2.tolist():
            group = batch.group_of_cell[i]
            start = batch.group_of_cell.index(group)
            pairs[pair_label(int(batch.group_ids[group]), i - start, j - start)] = {
                "chosen": float(policy_C[i]),
                "rejected": float(policy_C[j]),
                "reference_chosen": float(reference_C[i]),
                "reference_rejected": float(reference_C[j]),
            }
    return pairs
