"""Segment negatives of annotations by the weights in the model, which the ranks of a job make together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from bpo.bootstrap.completion_types import COMPLETION_TYPES, PROVENANCE_SOURCES
from bpo.bootstrap.engines.vision import TransformersVisionGenerator
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.sources import ImageAnswers
from bpo.config.training import Config
from bpo.data.encode import Dropped, Encoder
from bpo.data.groups import GroupDataset, MeasuredGroup
from bpo.engine import TrainingEngine
from bpo.job.collectives import gather_from_ranks
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from bpo.model.generate import generate_prompts
from bpo.records import Completion, PreferenceGroup, Provenance
from bpo.training.online.buffer import Negative
from bpo.training.online.prompts import Prompts

SOURCE = "segment"
Wanted = tuple[int, int]  # index of the annotation, step from 1


class NegativeMaker:
    """Makes and refuses negatives as the source `segment` of bootstrapping does, as its candidate number `step`.

    A negative depends on the weights in the model, `train.seed`, the record and the step for which it is made.
    """

    def __init__(self, config: Config, encoder: Encoder, trainer: TrainingEngine, prompts: Prompts):
        self.config = replace(config, bootstrap=replace(config.bootstrap, seed=config.train.seed))
        self.encoder, self.trainer, self.prompts = encoder, trainer, prompts

    def answer(self, wanted: Sequence[Wanted], stop: StopRequest | None) -> dict[int, Outcome]:
        """This rank's share of the negatives, by index in `wanted`. Called by all ranks with the same arguments.

        Under ZeRO-3, where all ranks must run the same layers, a rank without a prompt answers a stand-in image.

        Raises:
            Interrupted: on all ranks, if any of them was asked to stop.
        """
        ranks, size, is_whole = self.trainer.ranks, self.config.online.batch_size, not self.trainer.is_partitioned
        # Answers of similar lengths end together. The batches do not depend on the number of ranks.
        order = sorted(range(len(wanted)), key=lambda i: (len(self.prompts.usable[wanted[i][0]].response), i))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        outcomes: dict[int, Outcome] = {}
        with self.trainer.generating() as model:
            generator = TransformersVisionGenerator(model, self.encoder, self.config, keep_prefixes=is_whole)
            for start in range(0, len(batches), ranks.world_size):
                if self.trainer.sum_over_ranks([float(stop is not None and stop.received)])[0]:
                    raise Interrupted("stopped by a signal while negatives were being generated")
                own = batches[start + ranks.rank] if start + ranks.rank < len(batches) else []
                answered = self._answer_batch(generator, {index: wanted[index] for index in own})
                outcomes |= answered
                if not is_whole and all(outcome.status == "broken" for outcome in answered.values()):
                    prompts = [self.encoder.stand_in()]
                    sampling = {"max_new_tokens": [1], "temperature": 0.0, "top_p": 1.0, "seeds": [0]}
                    generate_prompts(model, self.encoder, prompts, **sampling)  # type: ignore[arg-type]
        return outcomes

    def _answer_batch(self, generator: TransformersVisionGenerator, batch: Mapping[int, Wanted]) -> dict[int, Outcome]:
        annotations = {index: self.prompts.usable[record] for index, (record, _) in batch.items()}
        sources = {i: ImageAnswers(SOURCE, self.config, generator, step) for i, (_, step) in batch.items()}
        ready = {index: source.prepare(annotations[index]) for index, source in sources.items()}
        asked = [index for index in batch if ready[index].error is None]
        outcomes = {i: Outcome("", SOURCE, "broken", reason=ready[i].error or "") for i in batch if i not in asked}
        requests = [ready[index].request for index in asked]
        for place, reply in generator.replies(requests, [ready[index].prepared for index in asked]):
            index = asked[place]
            outcomes[index] = sources[index].judge(annotations[index], requests[place], reply)
        return outcomes

    def measure(self, wanted: Sequence[Wanted], answered: Mapping[int, Outcome]) -> list[Negative | Dropped]:
        """The negatives of all ranks, in the order of `wanted`: measured for training, or why they are left out.

        Called by all ranks, each with its own share.
        """
        kept = [self.group(*wanted[i], outcome.text) for i, outcome in answered.items() if outcome.status == "kept"]
        measured = self.dataset(kept).measure_all(range(len(kept)), self.config.data.num_workers if kept else 0)
        mine: list[Any] = [[i, asdict(self._result(*wanted[i], outcome, measured))] for i, outcome in answered.items()]
        everyone = sorted((i, entry) for of_rank in gather_from_ranks(mine) for i, entry in of_rank)
        return [Negative.from_json(entry) if "record" in entry else Dropped(**entry) for _, entry in everyone]

    def _result(
        self, record: int, step: int, outcome: Outcome, measured: Iterator[MeasuredGroup | Dropped]
    ) -> Negative | Dropped:
        if outcome.status == "kept":
            found = next(measured)
            return found if isinstance(found, Dropped) else Negative(record, step, outcome.text, found)
        if outcome.status == "broken":
            return Dropped(self.group_id(record, step), "bad-image", outcome.reason)
        return Dropped(self.group_id(record, step), outcome.reason, f"{outcome.detail}: {outcome.text!r}")

    def dataset(self, groups: Sequence[PreferenceGroup]) -> GroupDataset:
        """Groups to be encoded as those of a file."""
        return GroupDataset(
            groups,
            self.encoder,
            max_words=self.config.data.max_completion_words,
            types=self.config.train.completion_types,
            plan=self.trainer.program.plan,
            image_keys=self.config.may_keep_features,
        )

    def group_id(self, record: int, step: int) -> str:
        return f"{self.prompts.usable[record].id}@{step}"

    def group(self, record: int, step: int, response: str) -> PreferenceGroup:
        """An annotation, preferred, and its negative made for a step."""
        annotation = self.prompts.usable[record]
        provenance = Provenance(source=PROVENANCE_SOURCES[SOURCE], model=self.config.model.path, candidate=step)
        completions = (
            Completion(annotation.response, 1.0, "gt", Provenance(source=PROVENANCE_SOURCES["annotation"])),
            Completion(response, 0.0, COMPLETION_TYPES[SOURCE], provenance),
        )
        return PreferenceGroup(self.group_id(record, step), annotation.images, annotation.prompt, completions)
