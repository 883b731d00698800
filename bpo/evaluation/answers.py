"""A model's greedy answers to questions about images, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bpo.records import ContentPart, Turn

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


@dataclass(frozen=True, slots=True)
class Request:
    """A question about an image (path relative to data.image_root)."""

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
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str = "answering",
    progress: bool = True,
) -> list[str]:
    """Greedy answers, one a request and in their order.

    Raises:
        ImageError: An image cannot be read; names it.
    """
    from bpo.model.generate import generate_answers

    answers: list[str] = []
    with tqdm(total=len(requests), desc=label, unit="answer", disable=not progress) as bar:
        for prompts in _encoded_batches(encoder, requests, batch_size):
            answers += generate_answers(
                model,
                encoder,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                top_p=1.0,
                seeds=[0] * len(prompts),
            )
            bar.update(len(prompts))
    return answers


def _encoded_batches(encoder: Encoder, requests: Sequence[Request], batch_size: int) -> Iterator[list[EncodedPrompt]]:
    """Batches in order, the next one decoded in a thread while the model answers the last."""

    def encode(start: int) -> list[EncodedPrompt]:
        batch = requests[start : start + batch_size]
        return [encoder.encode_prompt(request.id, (request.image,), request.prompt) for request in batch]

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = None
        for start in range(0, len(requests), batch_size):
            current = ahead or pool.submit(encode, start)
            following = start + batch_size
            ahead = pool.submit(encode, following) if following < len(requests) else None
            yield current.result()
