"""Answers of the policy in training to questions about images, shared by all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bpo.data.encode import EncodedPrompt, Encoder, EncodingError
from bpo.engine import TrainingEngine
from bpo.evaluation.answers import Request, batches_of
from bpo.formats.images import ImageError
from bpo.job.collectives import gather_from_ranks
from bpo.job.exits import Interrupted, JobError
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.model.generate import generate_answers


class AnsweringError(JobError):
    """A question cannot be asked, such as one about an image that was removed; names it."""


def answer_together(
    trainer: TrainingEngine,
    encoder: Encoder,
    requests: Iterable[Request],
    batch_size: int,
    stop: StopRequest | None = None,
) -> dict[Request, str]:
    """Greedy answers to all distinct requests, on every rank. Called by all ranks with the same arguments.

    Under ZeRO-3, where all ranks must run the same layers, a rank without a batch of its own repeats another one with
    answers of one token, and batches with and without images are not answered at the same time.

    Raises:
        AnsweringError: on all ranks, if a question cannot be encoded on any.
        Interrupted: on all ranks, if any of them was asked to stop.
    """
    requests = list(requests)
    mine: list[tuple[int, list[str]]] = []
    batches: list[list[Request]] = []
    with trainer.generating() as model:
        for has_image in (True, False):
            alike = batches_of((request for request in requests if bool(request.image) == has_image), batch_size)
            for number, is_own in _turns(len(alike), trainer.ranks):
                prompts = _encode(encoder, alike[number], stop)
                if is_own or trainer.is_partitioned:
                    answers = generate_answers(
                        model,
                        encoder,
                        prompts,
                        max_new_tokens=alike[number][0].max_new_tokens if is_own else 1,
                        temperature=0.0,
                        top_p=1.0,
                        seeds=[0] * len(prompts),
                    )
                    mine += [(len(batches) + number, answers)] if is_own else []
            batches += alike
    answers_of = {number: answers for of_rank in gather_from_ranks(mine) for number, answers in of_rank}
    return {
        request: answer
        for number, batch in enumerate(batches)
        for request, answer in zip(batch, answers_of[number], strict=True)
    }


def _turns(num_batches: int, ranks: Ranks) -> Iterator[tuple[int, bool]]:
    """This rank's batches, as many as any other's: the number of each, and whether it is the rank's own."""
    for start in range(0, num_batches, ranks.world_size):
        number = start + ranks.rank
        yield (number, True) if number < num_batches else (start, False)


def _encode(encoder: Encoder, batch: Sequence[Request], stop: StopRequest | None) -> list[EncodedPrompt]:
    """The prompts of a batch, once all ranks have theirs and none was asked to stop."""
    prompts, fault = [], ""
    try:
        for request in batch:
            prompts.append(encoder.encode_prompt(request.text, (request.image,) * bool(request.image), request.prompt))
    except (ImageError, EncodingError) as error:
        fault = str(error)
    everyone = gather_from_ranks([fault, stop is not None and stop.received])
    if faults := [fault for fault, _ in everyone if fault]:
        raise AnsweringError(f"the evaluation cannot ask its questions: {faults[0]}")
    if any(stopped for _, stopped in everyone):
        raise Interrupted("stopped by a signal in an evaluation")
    return prompts
