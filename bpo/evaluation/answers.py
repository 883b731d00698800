"""Greedy answers of a model to questions about images, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bpo.evaluation.answer_journal import AnswerJournal
from bpo.records import ContentPart, Turn

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


@dataclass(frozen=True, slots=True)
class Request:
    """A question about an image, given by its path relative to data.image_root."""

    id: str
    image: str
    text: str

    @property
    def prompt(self) -> tuple[Turn, ...]:
        return (Turn("user", (ContentPart("image"), ContentPart("text", self.text))),)


def answer_requests(
    model: Any,
    encoder: Encoder,
    requests: Sequence[Request],
    journal: AnswerJournal,
    benchmark: str,
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str = "answering",
    progress: bool = True,
) -> None:
    """Generates this rank's missing greedy answers into `journal`, batch by batch.

    Raises:
        ImageError: An image cannot be read; names it.
        Interrupted: A signal was received; finished batches are kept.
    """
    from bpo.model.generate import generate_answers

    batches = journal.batches(benchmark, len(requests), batch_size)
    total = sum(map(len, batches))
    with tqdm(total=total, desc=label, unit="answer", disable=not (progress and journal.ranks.is_main)) as bar:
        for batch, prompts in zip(batches, _encoded_batches(encoder, requests, batches), strict=True):
            journal.check_stop()
            answers = generate_answers(
                model,
                encoder,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                top_p=1.0,
                seeds=[0] * len(prompts),
            )
            journal.put(benchmark, dict(zip(batch, answers, strict=True)))
            bar.update(len(prompts))


def _encoded_batches(
    encoder: Encoder, requests: Sequence[Request], batches: Sequence[range]
) -> Iterator[list[EncodedPrompt]]:
    """Yields encoded batches; encodes the next one in a thread while the model answers the current one."""

    def encode(batch: range) -> list[EncodedPrompt]:
        return [encoder.encode_prompt(r.id, (r.image,), r.prompt) for r in (requests[number] for number in batch)]

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(encode, batches[0]) if batches else None
        for following in (*batches[1:], None):
            if ahead is None:
                return
            current, ahead = ahead, None if following is None else pool.submit(encode, following)
            yield current.result()
