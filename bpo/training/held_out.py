"""Groups held out of training, and the loss and reward accuracy of the policy on them."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import asdict, replace

from bpo.config.training import Config
from bpo.data.schedule import plan_steps
from bpo.engine import TrainingEngine
from bpo.job.collectives import gather_from_ranks
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from bpo.losses.program import LossOutput
from bpo.model.reference.store import ReferenceStore
from bpo.records import GroupBatch
from bpo.training.across_groups import StepPairs, couple
from bpo.training.batches import training_batches
from bpo.training.embeddings import PromptEmbeddings
from bpo.training.extrapolation import InitialPolicy, with_reference_states
from bpo.training.measure import TrainingData
from bpo.training.metrics import StepSums, num_lost, step_metrics

logger = logging.getLogger(__name__)


def _place(group_id: str) -> float:
    """A number in [0, 1) that depends on the id of the record alone.

    `bpo select` may give several groups of a record, `ID#1` and `replay:ID`: they must not be on both sides.
    """
    record = re.sub(r"(#\d+)+$", "", group_id.removeprefix("replay:")) or group_id
    digest = hashlib.sha256(f"held out of training:{record}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_held_out(data: TrainingData, amount: float) -> tuple[TrainingData, TrainingData | None]:
    """Divides the usable groups into those to train on and those to evaluate on.

    A group's side does not depend on the order of the file. With a share, nor does it on the other groups; with a
    number, a group that is added later may take the place of one that was held out. Groups of one id stay together.

    Args:
        amount: `train.held_out_groups`: a share below 1, or a number of groups.

    Returns:
        Both parts; None for the second if `amount` is 0. The order of the held-out groups is that of their hashes.

    Raises:
        ValueError: one of the parts is empty.
    """
    if not amount:
        return data, None
    places = [_place(data.dataset.groups[index].id) for index in data.usable]
    order = sorted(range(len(places)), key=lambda g: (places[g], data.usable[g]))
    limit = amount if amount < 1 else places[order[min(int(amount), len(order)) - 1]]
    held = [g for g in order if places[g] < limit or (amount >= 1 and places[g] == limit)]
    if not held or len(held) == len(places):
        rest = "none are left to train on" if held else "none are held out"
        raise ValueError(f"train.held_out_groups is {amount:g}: of {len(places)} usable groups {rest}; change it")
    kept = sorted(set(order) - set(held))
    logger.info("held out of training: %d of %d groups", len(held), len(places))
    return _part(data, kept), _part(data, held)


def _part(data: TrainingData, groups: list[int]) -> TrainingData:
    return replace(data, usable=tuple(data.usable[g] for g in groups), measured=tuple(data.measured[g] for g in groups))


class HeldOutLoss:
    """Evaluates the loss of the run on held-out groups; all ranks share them and make the same calls.

    The groups are divided into steps of `train.groups_per_step`, so that terms across groups compare as many pairs as
    in training. States of stateful terms are read, not updated.
    """

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        trainer: TrainingEngine,
        store: ReferenceStore | None,
        embeddings: PromptEmbeddings | None,
        initial: InitialPolicy | None = None,
    ):
        self.config, self.data, self.trainer, self.store, self.embeddings = config, data, trainer, store, embeddings
        self.initial = initial
        self.steps = plan_steps(
            data.num_tokens,
            groups_per_step=config.train.groups_per_step,
            epochs=1,
            seed=0,
            world_size=trainer.ranks.world_size,
            max_tokens=max(1, config.train.max_micro_batch_tokens - data.stand_in_tokens),
            row_tokens=data.row_tokens,
        )

    def metrics(self, stop: StopRequest | None) -> dict[str, float]:
        """Means over the pairs of all held-out groups, by the names of training metrics.

        Raises:
            Interrupted: on all ranks, if any of them was asked to stop.
            RecordError, TooManyBadRecords: a group is no longer what was measured; see `LostGroups.report`.
        """
        trainer = self.trainer
        sums = StepSums.zero(trainer.program)
        for batches in training_batches(self.config.data, self.data, self.steps, self.store, trainer):
            outputs = []
            for batch, reference_ND in with_reference_states(batches, self.initial):
                output = trainer.program.apply(trainer.evaluate(batch, reference_ND), batch.loss_inputs)
                sums.add(output, batch)
                outputs.append((output, batch))
            self._add_coupled(outputs, sums)
            if trainer.sum_over_ranks([float(stop is not None and stop.received)])[0]:
                raise Interrupted("stopped by a signal in an evaluation")
        totals = trainer.sum_over_ranks(sums.flat())
        if num_lost(totals):
            lost = gather_from_ranks([asdict(group) for group in sums.lost])
            self.data.lost.report(lost, is_main=trainer.ranks.is_main)
        return step_metrics(totals, trainer.program)

    def _add_coupled(self, outputs: list[tuple[LossOutput, GroupBatch]], sums: StepSums) -> None:
        """Adds the terms across groups, whose loss is that of a whole step."""
        program, rank = self.trainer.program, self.trainer.ranks.rank
        for index in sorted({index for output, _ in outputs for index in output.across}):
            pairs = StepPairs.of(program, index, outputs)
            sums.terms[index] += couple(pairs, program, index, self.embeddings, rank, first=False).loss
