"""The bpo provider of `bpo bench step`: calls the functions of `bpo/train.py` in the same order for one step."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bpo import engine
from bpo.config.training import Config
from bpo.data.encode import load_encoder
from bpo.engine import TrainingEngine
from bpo.job import collectives
from bpo.job.launch import Ranks, pick_device
from bpo.model.levers.install import choose_levers, install_levers
from bpo.model.load import ResolvedModel, load_base, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch, UsefulWork
from bpo.tools.bench.case import StepCase, pair_label, set_adapter
from bpo.tools.bench.meter import Meter
from bpo.tools.bench.workers import Session
from bpo.training.batches import training_batches
from bpo.training.features import use_step_features
from bpo.training.flops import ModelFlops, model_flops
from bpo.training.measure import measure_groups
from bpo.training.metrics import step_metrics
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from bpo.training.step import run_step
from bpo_kernels.dispatch import chosen_implementation


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


@dataclass(frozen=True)
class OpenStep:
    """A prepared step: engine, micro-batches with their reference, and facts about the model.

    Attributes:
        logps: Receives each micro-batch's log-probs [N] in a forward pass.
        adapter: Digest of the adapter's weights.
        closing: What to close after the last step.
    """

    config: Config
    trainer: TrainingEngine
    batches: list[GroupBatch]
    meter: Meter
    flops: ModelFlops
    logps: list[torch.Tensor]
    adapter: str
    closing: contextlib.ExitStack

    @property
    def model(self) -> Any:
        return self.trainer.policy.model

    def useful_work(self) -> UsefulWork:
        return functools.reduce(operator.add, (batch.useful_work for batch in self.batches))

    def run(self, num_pairs: int) -> tuple[list[float], float]:
        """One step: forward, backward and optimizer; the sums of `StepSums.flat` and the gradient norm."""
        self.logps.clear()
        sums = run_step(self.trainer, self.batches, self.config, num_pairs, step=1)
        return self.trainer.read_step(sums.on_device(), self.trainer.step(1.0))

    def results(self, flat: list[float], grad_norm: float) -> dict[str, Any]:
        """`loss`, `grad_norm` and summed log-probs by pair of the step that was last run."""
        loss = step_metrics(flat, self.trainer.program)["loss"]
        return {"loss": loss, "grad_norm": grad_norm, "pairs": _pairs(self.batches, self.logps)}


def open_step(config: Config, resolved: ResolvedModel, ranks: Ranks) -> OpenStep:
    """Creates model, engine, store and micro-batches as training does, in an initialised process group."""
    encoder = load_encoder(config, resolved.config)
    data = measure_groups(config, encoder, ranks, collectives.gather_from_ranks)
    (step,) = plan_training(config.train, data, ranks)
    settings = engine.deepspeed_config(config.train, resolved.dtype, len(step.micro_batches[0]))
    model = load_base(resolved)
    prepare_trainable(model, encoder.family, config)
    install_levers(model, encoder.family, config, choose_levers(config, resolved))
    adapter = set_adapter(model, resolved.dtype)
    flops = model_flops(model, encoder.family)
    trainer = TrainingEngine(PolicyModel(model), encoder.family, config, settings, ranks)
    meter = Meter(model, encoder.family.language_module, encoder.family.vision_module, trainer.device)
    closing = contextlib.ExitStack()
    use_step_features(config, resolved, trainer, encoder.family, closing)
    with without_adapter(model):
        store = fill_reference_store(config, resolved, trainer, data)
    batches = list(next(training_batches(config.data, data, [step], store, trainer)))
    logps: list[torch.Tensor] = []
    trainer.policy.register_forward_hook(lambda module, args, output: logps.append(output[1].detach()))
    meter.release()
    return OpenStep(config, trainer, batches, meter, flops, logps, adapter, closing)


def serve(case: StepCase, session: Session, provider: str) -> None:
    """Opens the step, then runs it, or its reference pass, for each command."""
    config = case.config()
    ranks = Ranks()
    engine.init_distributed(ranks)
    opened = open_step(config, resolve_model(config.model, pick_device(ranks), for_training=True), ranks)
    session.ready(
        adapter=opened.adapter,
        kernels=chosen_implementation(torch.empty(0, device=opened.trainer.device)),
        useful_flops=opened.flops.step(opened.useful_work()),
    )
    while (command := session.receive()).what != "stop":
        result: dict[str, Any] = {}
        with opened.meter.measure(command.kind, result):
            if command.what == "reference":
                for batch in opened.batches:
                    opened.trainer.reference_logp(batch)
            else:
                flat, grad_norm = opened.run(case.num_pairs)
        if command.what == "step":
            found = opened.results(flat, grad_norm)
            result |= found if command.kind == "plain" else {name: found[name] for name in ("loss", "grad_norm")}
        opened.logps.clear()
        if not command.keep_cache:
            opened.meter.release()
        session.answer(result)
    opened.closing.close()
    collectives.shut_down()


def _pairs(batches: list[GroupBatch], logps: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Summed policy and reference log-probs of both completions, by pair."""
    pairs: dict[str, dict[str, float]] = {}
    for batch, logp_N in zip(batches, logps, strict=True):
        assert batch.loss_inputs.reference is not None
        owner_N = batch.loss_inputs.completion_of_token_N.cpu()
        zeros_C = torch.zeros(batch.loss_inputs.num_completions, dtype=torch.float64)
        policy_C = zeros_C.index_add(0, owner_N, logp_N.double().cpu())
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
