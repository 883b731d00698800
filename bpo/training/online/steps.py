"""Groups of the steps of an online run: negatives by an average of the policy, made while it trains (SAPO).

    before every generate_every_steps   the average answers the prompts of these steps; the negatives go into the
                                        buffer, from which each step draws its groups
    before their first step             reference log-probs of the drawn groups
    after each step                     the average moves towards the policy; the reference may move

    OUTPUT/online/window-00000001.jsonl             groups made for step 1 and following ones, as in a groups file
    OUTPUT/online/window-00000001.refused.jsonl     id, reason, detail of negatives that were left out
    OUTPUT/online/lost.jsonl                        annotations whose images cannot be used

Average, reference, buffer and drawn groups are part of a checkpoint: a continued run repeats an unbroken one.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bpo.config.training import Config
from bpo.data.encode import Dropped, Encoder
from bpo.data.groups import BAD_REASONS, write_dropped
from bpo.data.schedule import PlannedStep, plan_step
from bpo.engine import TrainingEngine
from bpo.formats.files import group_to_json
from bpo.job.collectives import from_rank_0
from bpo.job.durable import write_durably
from bpo.job.guard import RunGuard
from bpo.job.journal import to_line
from bpo.job.seeds import derive_seed
from bpo.job.signals import StopRequest
from bpo.records import LostGroup
from bpo.training.batches import StepBatches, training_batches
from bpo.training.evaluation import kept_random_state
from bpo.training.lost import FILE, LostGroups
from bpo.training.measure import TrainingData
from bpo.training.online.buffer import Negative, ReplayBuffer
from bpo.training.online.generate import NegativeMaker, Wanted
from bpo.training.online.prompts import Prompts
from bpo.training.online.reference import MovingReference
from bpo.training.shadow import ShadowWeights

logger = logging.getLogger(__name__)

_COSTS = ("generate_seconds", "reference_seconds", "reference_tokens", "negatives", "refused")


@dataclass
class LostDraws(LostGroups):
    """Lost groups of some steps, which are reported once for each annotation of the run.

    Attributes:
        records: Of each group the index of its annotation.
        of_run: The lost annotations.
    """

    records: Sequence[int] = ()
    of_run: LostGroups = field(default_factory=LostGroups)

    def report(self, everyone: Iterable[Sequence[Mapping[str, Any]]], *, is_main: bool) -> None:
        entries = [entry for of_rank in everyone for entry in of_rank]
        self.of_run.report([[{**entry, "index": self.records[entry["index"]]} for entry in entries]], is_main=is_main)
        self.indices |= {entry["index"] for entry in entries}


class OnlineGroups:
    """Makes the groups of each step. All ranks make the same calls.

    Args:
        steps: The prompts of each step, for which it makes negatives.
        fingerprint: Of the policy before its first step (`run_fingerprint`).
    """

    def __init__(
        self,
        config: Config,
        trainer: TrainingEngine,
        encoder: Encoder,
        prompts: Prompts,
        steps: Sequence[PlannedStep],
        fingerprint: dict[str, str],
        guard: RunGuard,
        stop: StopRequest | None,
    ):
        self.config, self.options, self.trainer, self.steps = config, config.online, trainer, steps
        self._guard, self._stop = guard, stop
        self._folder = Path(config.train.output_dir) / "online"
        self._maker = NegativeMaker(config, encoder, trainer, prompts)
        self.average = ShadowWeights(trainer)
        self.reference = MovingReference(config, trainer, fingerprint) if trainer.program.needs_reference else None
        trainer.copies = {"average": self.average.flats}
        if self.reference is not None:
            trainer.copies["reference"] = self.reference.weights.flats
        size_mb = self.average.num_bytes / 1e6
        logger.info("online: %d copies of the trained weights, %.1f MB per rank each", len(trainer.copies), size_mb)
        self.buffer = ReplayBuffer(self.options.buffer_size)
        self._drawn: dict[int, list[Negative]] = {}  # step index -> its groups
        # By annotation, of which several groups may be lost.
        self._lost = LostGroups(self._folder / FILE, config.data.annotations, prompts.bad, prompts.num_records)
        self._costs = dict.fromkeys(_COSTS, 0.0)
        self._done = 0

    def start(self, state: str) -> None:
        """Continues from the `state` in a checkpoint, after its weights were restored; empty for a new run."""
        if state:
            stored = json.loads(state)
            self._done, self._costs = stored["done"], stored["costs"]
            entries = [[Negative.from_json(negative), times] for negative, times in stored["buffer"]]
            self.buffer = ReplayBuffer(self.options.buffer_size, entries)
            self._drawn = {int(k): [Negative.from_json(entry) for entry in of] for k, of in stored["drawn"].items()}
            if self.reference is not None:
                self.reference.moved_at = stored["reference_moved_at"]
        from_rank_0(self._clean)
        if self.reference is not None:
            self.reference.publish()

    def _clean(self) -> None:
        """Removes what an earlier start has left for steps that are still to come."""
        if not self._done:
            shutil.rmtree(self._folder, ignore_errors=True)
        elif (reference := self.reference) is not None:
            reference.remove_stores(lambda moved_at: moved_at > reference.moved_at)
        self._folder.mkdir(parents=True, exist_ok=True)

    def state(self) -> str:
        """What a checkpoint contains of the run in addition to weights, as JSON."""
        stored = {
            "done": self._done,
            "costs": self._costs,
            "buffer": [[asdict(negative), times] for negative, times in self.buffer.entries],
            "drawn": {k: [asdict(negative) for negative in of] for k, of in self._drawn.items() if k >= self._done},
            "reference_moved_at": 0 if self.reference is None else self.reference.moved_at,
        }
        return json.dumps(stored)

    def batches(self, todo: Sequence[PlannedStep]) -> Iterator[StepBatches]:
        """The micro-batches of each step. What precedes a step is done when its batches are asked for.

        Raises:
            Interrupted: on all ranks, if any of them was asked to stop; `state` can be saved then.
            ValueError: no negative of the first steps can be used.
        """
        while todo:
            first = todo[0].index
            if first not in self._drawn:
                self._make_window(first)
            end = min(max(self._drawn) + 1, self.reference.next_move(first) if self.reference else len(self.steps))
            span, todo = [s for s in todo if s.index < end], [s for s in todo if s.index >= end]
            yield from self._batches_of_span(span)

    def _make_window(self, first: int) -> None:
        """Makes the negatives of step `first` and of the others of its window, and draws the groups of each."""
        started, every = time.perf_counter(), self.options.generate_every_steps
        window = self.steps[first : first - first % every + every]
        wanted = [(record, step.index + 1) for step in window for record in step.groups]
        self._guard.watchdog.beat(f"the negatives of step {first + 1}")
        with kept_random_state(self.trainer.device), self.average.using():
            answers = self._maker.answer(wanted, self._stop)
        with self._guard.phase("measuring the negatives"):
            outcomes = self._maker.measure(wanted, answers)
            from_rank_0(lambda: self._write_window(first + 1, outcomes))
        self._report_lost(wanted, outcomes)
        made = [outcome for outcome in outcomes if isinstance(outcome, Negative)]
        self.buffer.append(made)
        if not self.buffer.entries:
            counts = Counter(outcome.reason for outcome in outcomes if isinstance(outcome, Dropped))
            raise ValueError(
                f"none of the first {len(wanted)} negatives can be used ({dict(counts)}): see {self._folder}; more "
                "prompts (train.groups_per_step, online.generate_every_steps) or other bootstrap.validate.* help"
            )
        seed = self.config.train.seed
        self._drawn = {s.index: self.buffer.draw(len(s.groups), derive_seed(seed, "draw", s.index)) for s in window}
        self._costs["negatives"] += len(made)
        self._costs["refused"] += len(wanted) - len(made)
        self._costs["generate_seconds"] += time.perf_counter() - started

    def _write_window(self, number: int, outcomes: Sequence[Negative | Dropped]) -> None:
        path = self._folder / f"window-{number:08d}.jsonl"
        made = [self._maker.group(n.record, n.step, n.response) for n in outcomes if isinstance(n, Negative)]
        write_durably(path, b"".join(to_line(group_to_json(group)) for group in made), sync=False)
        if len(made) < len(outcomes):
            write_dropped([o for o in outcomes if isinstance(o, Dropped)], path.with_suffix(".refused.jsonl"))

    def _report_lost(self, wanted: Sequence[Wanted], outcomes: Sequence[Negative | Dropped]) -> None:
        """Applies `data.on_bad` and `data.max_bad_share` to annotations that cannot be used, once for each."""
        lost = {
            record: asdict(LostGroup(record, outcome.group_id, outcome.reason, outcome.detail))
            for (record, _), outcome in zip(wanted, outcomes, strict=True)
            if isinstance(outcome, Dropped) and outcome.reason in BAD_REASONS
        }
        self._lost.report([list(lost.values())], is_main=self.trainer.ranks.is_main)

    def _batches_of_span(self, span: Sequence[PlannedStep]) -> Iterator[StepBatches]:
        """The batches of steps of one window that have the same reference."""
        drawn = [negative for step in span for negative in self._drawn[step.index]]
        dataset = self._maker.dataset([self._maker.group(n.record, n.step, n.response) for n in drawn])
        places, store = iter(range(len(drawn))), None
        lost = LostDraws(records=[negative.record for negative in drawn], of_run=self._lost)
        data = TrainingData(dataset, tuple(range(len(drawn))), tuple(negative.measured for negative in drawn), lost)
        if self.reference is not None:
            started = time.perf_counter()
            store, num_tokens = self.reference.fill(data, self._stop)
            self._costs["reference_seconds"] += time.perf_counter() - started
            self._costs["reference_tokens"] += num_tokens
        limit = self.config.train.max_micro_batch_tokens
        max_tokens = max(1, limit - data.stand_in_tokens)
        sizes = data.num_tokens, self.trainer.ranks.world_size, max_tokens, data.row_tokens
        planned = [plan_step(s.index, s.epoch, [next(places) for _ in s.groups], *sizes) for s in span]
        yield from training_batches(self.config.data, data, planned, store, self.trainer, max_tokens=limit)

    def after_step(self, number: int) -> None:
        """Moves the average and, if that is due, the reference, after step `number`, from 1."""
        self.average.update(self.options.ema_decay)
        if self.reference is not None:
            with self._guard.phase("publishing the reference"):
                self.reference.after_step(number, self.average)
        self.buffer.remove(self._lost.indices)
        self._done = number

    def metrics(self) -> dict[str, float]:
        """What the groups have cost since the last call, summed over the steps, and the size of the buffer."""
        costs, self._costs = {**self._costs, "buffer": len(self.buffer.entries)}, dict.fromkeys(_COSTS, 0.0)
        return {f"online/{name}": value for name, value in costs.items()}
