"""Forward and backward of one optimizer step."""

from __future__ import annotations

import torch

from bpo.config.training import Config
from bpo.engine import TrainingEngine
from bpo.losses.program import LossOutput
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers.lora import adapter_dropout
from bpo.records import GroupBatch
from bpo.training.across_groups import StepPairs, couple
from bpo.training.batches import StepBatches
from bpo.training.checks import seed_micro_batch
from bpo.training.embeddings import PromptEmbeddings
from bpo.training.extrapolation import InitialPolicy, with_reference_states
from bpo.training.loss_state import Observations
from bpo.training.metrics import StepSums


def run_step(
    trainer: TrainingEngine,
    batches: StepBatches | list[GroupBatch],
    config: Config,
    num_pairs: int,
    step: int,
    embeddings: PromptEmbeddings | None = None,
    initial: InitialPolicy | None = None,
) -> StepSums:
    """Accumulates this rank's share of the gradient; loss = sum of weight * loss over the global batch / its pairs.

    The divisor is the number of preference pairs, not the sum of their weights: with weights of mean 1 over the data,
    the expected gradient is that of the weighted data, and it does not depend on which pairs share a step.

    Terms across groups need all log-ratios of the step before the first backward pass: the activations of all its
    micro-batches are then kept, and no forward pass is repeated.

    Args:
        batches: This rank's micro-batches, on the trainer's device.
        num_pairs: Preference pairs of the step over all ranks.
        step: Index of the step, from 0.
        embeddings: Of the prompts, for terms that compare them.
        initial: The reference, for terms that extrapolate from it.
    """
    sums, observations = StepSums.zero(trainer.program), Observations(trainer.program)
    count, waiting, seeds = len(batches), [], []
    for k, (batch, reference_ND) in enumerate(with_reference_states(trainer.prepare_images(batches), initial)):
        seeds.append(seed_micro_batch(config.train.seed, step, k, trainer.ranks.rank))
        with packed_layout(batch.layout), adapter_dropout(seeds[-1], trainer.device):
            output = _forward(trainer, batch, reference_ND, sums, first=step == 0)
            observations.add(output, batch)
            if trainer.program.couples_groups:
                waiting.append((output, batch))
            else:
                trainer.backward(output.total / max(1, num_pairs), is_last=k == count - 1)
        sums.add(output, batch)
    if waiting:
        _backward_coupled(trainer, waiting, seeds, sums, num_pairs, embeddings, first=step == 0)
    observations.update_states()
    return sums


def _forward(
    trainer: TrainingEngine, batch: GroupBatch, reference_ND: torch.Tensor | None, sums: StepSums, *, first: bool
) -> LossOutput:
    head = trainer.forward(batch, reference_ND)
    inputs = batch.loss_inputs
    if first and inputs.reference is not None and not batch.is_filler:
        with torch.no_grad():
            sums.expect(trainer.program.at_reference(head, inputs).total)
    return trainer.program.apply(head, inputs)


def _backward_coupled(
    trainer: TrainingEngine,
    waiting: list[tuple[LossOutput, GroupBatch]],
    seeds: list[int],
    sums: StepSums,
    num_pairs: int,
    embeddings: PromptEmbeddings | None,
    *,
    first: bool,
) -> None:
    """Backward passes of micro-batches whose terms across groups depend on each other."""
    totals = [output.total for output, _ in waiting]
    for index in sorted({index for output, _ in waiting for index in output.across}):
        pairs = StepPairs.of(trainer.program, index, waiting)
        coupled = couple(pairs, trainer.program, index, embeddings, trainer.ranks.rank, first=first)
        weight = trainer.program.terms[index].options.weight
        sums.terms[index] += coupled.loss
        sums.expected_first_loss += weight * coupled.expected
        totals = [total + weight * share for total, share in zip(totals, coupled.shares, strict=True)]
    for k, ((_, batch), total, seed) in enumerate(zip(waiting, totals, seeds, strict=True)):
        with packed_layout(batch.layout), adapter_dropout(seed, trainer.device):
            trainer.backward(total / max(1, num_pairs), is_last=k == len(waiting) - 1, after_forward=k == 0)
