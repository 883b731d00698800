"""Plans the steps of a run, and reports how evenly the ranks are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from bpo.config.training import Config, TrainConfig
from bpo.data.encode import Encoder
from bpo.data.groups import GroupDataset
from bpo.data.schedule import PlannedStep, plan_balance, plan_steps
from bpo.job.collectives import gather_from_ranks
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.training.held_out import split_held_out
from bpo.training.measure import TrainingData, measure_groups
from bpo.training.online.prompts import Prompts, read_prompts

logger = logging.getLogger(__name__)

# The plan warns if the busiest rank's tokens exceed the mean by more than this share.
MAX_IMBALANCE = 0.02


@dataclass(frozen=True)
class RunGroups:
    """What a run trains and evaluates on.

    Attributes:
        measured: The groups whose reference is computed before the first step.
        data: Those to train on; none for an online run, which makes them from its prompts.
        steps: The plan, of the groups or of the prompts.
    """

    measured: TrainingData
    data: TrainingData
    held_out: TrainingData | None
    steps: list[PlannedStep]
    prompts: Prompts | None = None

    @property
    def num_per_epoch(self) -> int:
        return len(self.data.usable if self.prompts is None else self.prompts.usable)

    def content(self) -> Iterator[str]:
        """What the run trains on, as lines that a checkpoint compares."""
        return self.data.content() if self.prompts is None else self.prompts.content()


def plan_groups(
    config: Config, encoder: Encoder, ranks: Ranks, stop: StopRequest | None, *, continuing: bool
) -> RunGroups:
    """Measures the groups and plans the steps; for an online run, reads the annotations. Raises as these do."""
    measured = TrainingData(GroupDataset((), encoder, max_words=0, types=()), (), ())
    data, held_out = measured, None
    if not config.online.source or config.train.held_out_groups:
        measured = measure_groups(config, encoder, ranks, gather_from_ranks, stop, continuing=continuing)
        data, held_out = split_held_out(measured, config.train.held_out_groups)
    if not config.online.source:
        return RunGroups(measured, data, held_out, plan_training(config.train, data, ranks))
    ids = {held_out.dataset.groups[index].id for index in held_out.usable} if held_out else set()
    prompts, train = read_prompts(config, ids), config.train
    # Each prompt is a micro-batch of its own, so that no step has more micro-batches than its plan.
    steps = plan_steps(
        [1] * len(prompts.usable),
        groups_per_step=train.groups_per_step,
        epochs=train.epochs,
        seed=train.seed,
        world_size=1,
        max_tokens=1,
        max_steps=train.max_steps,
    )
    return RunGroups(held_out or measured, data, held_out, steps, prompts)


def plan_training(config: TrainConfig, data: TrainingData, ranks: Ranks) -> list[PlannedStep]:
    """Plans the steps of the run; logs their balance and warns if ranks will wait for each other."""
    num_tokens = data.num_tokens
    steps = plan_steps(
        num_tokens,
        groups_per_step=config.groups_per_step,
        epochs=config.epochs,
        seed=config.seed,
        world_size=ranks.world_size,
        max_tokens=max(1, config.max_micro_batch_tokens - data.stand_in_tokens),
        max_steps=config.max_steps,
        row_tokens=data.row_tokens,
    )
    if ranks.is_main:
        _report_sequences(data)
        _report_balance(config, steps, num_tokens, ranks.world_size)
    return steps


def _report_sequences(data: TrainingData) -> None:
    """Logs why completions do not share their prefix, and the cost, if they do not."""
    if data.separate_reason is None:
        return
    separate, shared = sum(data.num_tokens), sum(group.num_tokens for group in data.measured)
    logger.warning(
        "separate sequences: completions do not share their prefix (%s); an epoch processes %s tokens in the language "
        "model, %.2f times the %s of shared prefixes",
        data.separate_reason,
        f"{separate:,}",
        separate / shared,
        f"{shared:,}",
    )


def _report_balance(train: TrainConfig, steps: list[PlannedStep], num_tokens: list[int], world_size: int) -> None:
    most = max(len(step.micro_batches[0]) for step in steps)
    logger.info("plan: %d steps of %d groups, up to %d micro-batches per rank", len(steps), len(steps[0].groups), most)
    if world_size == 1:
        return
    balance = plan_balance(steps, num_tokens)
    logger.info(
        "plan: the busiest of %d ranks processes %.1f %% more tokens than the mean per step (at most %.1f %%), "
        "%.1f %% more per micro-batch (at most %.1f %%)",
        world_size,
        100 * balance.step_mean,
        100 * balance.step_largest,
        100 * balance.micro_batch_mean,
        100 * balance.micro_batch_largest,
    )
    if balance.micro_batch_mean > MAX_IMBALANCE:
        logger.warning(
            "ranks will wait for each other %.0f %% of the time: too few groups to balance; train.groups_per_step=%d "
            "is %.1f groups per rank and %.1f per micro-batch; with at least 8 of each (raise train.groups_per_step or "
            "train.max_micro_batch_tokens=%d) ranks differ by less than %.0f %%",
            100 * balance.micro_batch_mean / (1 + balance.micro_batch_mean),
            train.groups_per_step,
            len(steps[0].groups) / world_size,
            len(steps[0].groups) / (world_size * len(steps[0].micro_batches[0])),
            train.max_micro_batch_tokens,
            100 * MAX_IMBALANCE,
        )
