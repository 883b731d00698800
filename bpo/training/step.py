"""Forward and backward of one optimizer step."""

from __future__ import annotations

from bpo.config.training import Config
from bpo.engine import TrainingEngine
from bpo.model.attention.shared_prefix import packed_layout
from bpo.records import GroupBatch
from bpo.training.batches import StepBatches
from bpo.training.checks import expected_loss, seed_micro_batch
from bpo.training.metrics import StepSums


def run_step(
    trainer: TrainingEngine, batches: StepBatches | list[GroupBatch], config: Config, num_pairs: int, step: int
) -> StepSums:
    """Accumulates this rank's share of the gradient; loss = sum of weight * loss over the global batch / its pairs.

    The divisor is the number of pairs, not the sum of their weights: with weights of mean 1 over the data, the expected
    gradient is that of the weighted data, and it does not depend on which pairs share a step.

    Args:
        batches: This rank's micro-batches, on the trainer's device.
        num_pairs: Pairs of the step over all ranks.
        step: Index of the step, from 0.
    """
    sums = StepSums.zero()
    for k, batch in enumerate(batches):
        seed_micro_batch(config.train.seed, step, k, trainer.ranks.rank)
        with packed_layout(batch.layout):
            output = trainer.forward(batch, config.loss)
            share = (output.loss_P * batch.loss_inputs.pair_weight_P).sum() / max(1, num_pairs)
            trainer.backward(share, is_last=k == len(batches) - 1)
        sums.add(output, batch)
        if step == 0:
            sums.expected_first_loss += expected_loss(batch.loss_inputs, config.loss)
    return sums
