"""The multimodal model that answers (weakened) images: in this process, or behind a chat engine."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from bpo.bootstrap.engines.text import ChatEngine, Reply
from bpo.bootstrap.weaken import Weakening, picture_weakener, weaken_images
from bpo.config.training import Config
from bpo.data.encode import EncodedImages, EncodedPrompt, Encoder, EncodingError
from bpo.formats.images import load_image
from bpo.model.generate import generate_prompts
from bpo.model.kv_cache import CachedPrefix, Prefixes, common_beginning
from bpo.records import ContentPart, Turn


@dataclass(frozen=True, slots=True)
class VisionRequest:
    """A prompt about images, what is done to them, and how the answer begins.

    Attributes:
        weakening: Its seed also decides sampling.
        beginning: Text with which the answer begins; the reply goes on from it and holds it.
    """

    record_id: str
    images: tuple[str, ...]
    prompt: tuple[Turn, ...]
    weakening: Weakening
    beginning: str = ""


class VisionGenerator(Protocol):
    """A multimodal model. A request's images are prepared first, perhaps while the model still answers others."""

    name: str
    whole_batches: bool
    special_tokens: tuple[str, ...]

    def prepare(self, request: VisionRequest) -> Any:
        """Reads and weakens the images of a request, for `replies`. Touches no model, and may run in any thread.

        Raises:
            ImageError: an image cannot be read.
        """

    def replies(self, requests: Sequence[VisionRequest], prepared: Sequence[Any]) -> Iterable[tuple[int, Reply]]:
        """(index, reply) of every request, in any order; a broken record's reply has `error` and `is_broken`."""


class TransformersVision:
    """The model in memory: one left-padded batch, each record sampled by its own seed."""

    whole_batches = True

    def __init__(self, model: Any, encoder: Encoder, config: Config):
        self.model, self.encoder, self.config = model, encoder, config
        self.name = config.model.path
        self.special_tokens = special_tokens_of(encoder)
        self._cache = config.bootstrap.cache
        enabled = encoder.family.begins_from_cache and self._cache != "static"
        self._prefixes = Prefixes(model, encoder.family.generation_inputs, enabled)

    def prepare(self, request: VisionRequest) -> EncodedImages:
        weakening = request.weakening
        picture = picture_weakener(weakening, self.config.bootstrap.weaken, self.encoder.processor.image_processor)
        images = self.encoder.encode_images(_shown(request)[0], picture if weakening.changes_pictures else None)
        if weakening.kind == "noise" and weakening.space == "normalised":
            assert weakening.noise_step is not None
            images = weaken_images(images, self.encoder.family, weakening.noise_step, weakening.seed)
        return images

    def replies(
        self, requests: Sequence[VisionRequest], prepared: Sequence[EncodedImages]
    ) -> Iterator[tuple[int, Reply]]:
        options = self.config.bootstrap.weaken
        prompts: dict[int, EncodedPrompt] = {}
        beginnings: dict[int, tuple[int, ...]] = {}
        for index, (request, images) in enumerate(zip(requests, prepared, strict=True)):
            try:
                prompts[index], beginnings[index] = self._encode(request, images)
            except EncodingError as error:
                yield index, Reply("", error=str(error), is_broken=True)
        answers = generate_prompts(
            self.model,
            self.encoder,
            list(prompts.values()),
            max_new_tokens=[options.max_new_tokens] * len(prompts),
            temperature=options.temperature,
            top_p=options.top_p,
            seeds=[requests[index].weakening.seed for index in prompts],
            beginnings=list(beginnings.values()),
            prefix=self._prefix(list(prompts.values())),
            cache=self._cache,
        )
        for index, (text, ended) in zip(prompts, answers, strict=True):
            yield index, Reply(text, ended)

    def _prefix(self, prompts: Sequence[EncodedPrompt]) -> CachedPrefix | None:
        """What the batch begins with up to the first image: a system prompt, say. Of the batch alone."""
        if len(prompts) < 2:
            return None
        return self._prefixes.of(common_beginning([p.prefix_ids for p in prompts], self.encoder.image_token_id))

    def _encode(self, request: VisionRequest, images: EncodedImages) -> tuple[EncodedPrompt, tuple[int, ...]]:
        prompt = self.encoder.encode_prompt(request.record_id, images, _shown(request)[1])
        beginning = self.encoder.encode_completion(request.beginning)[:-1] if request.beginning else ()
        prompt = replace(prompt, prefix_ids=(*prompt.prefix_ids, *beginning))
        if len(prompt.prefix_ids) >= self.encoder.max_length_tokens:
            raise EncodingError(
                f"record {request.record_id!r}: the prompt takes {len(prompt.prefix_ids)} tokens and leaves no room in "
                f"data.max_length_tokens={self.encoder.max_length_tokens}"
            )
        return prompt, beginning


class ChatVision:
    """A multimodal model behind a chat engine, which is sent weakened pictures as PNG.

    Args:
        engine: A server, or vLLM in this process.
        name: For the provenance.
        encoder: Where `model.path` names the model too: its normalisation and control tokens are then used.
    """

    whole_batches = False

    def __init__(self, engine: ChatEngine, config: Config, name: str, encoder: Encoder | None):
        self.engine, self.config, self.name = engine, config, name
        self.special_tokens = special_tokens_of(encoder) if encoder else ()
        self._image_processor = encoder.processor.image_processor if encoder else None

    def replies(
        self, requests: Sequence[VisionRequest], prepared: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, Reply]]:
        bodies = [(request.record_id, body) for request, body in zip(requests, prepared, strict=True)]
        for index, reply in self.engine.replies(bodies):
            yield index, reply if reply.error else replace(reply, text=requests[index].beginning + reply.text)

    def prepare(self, request: VisionRequest) -> dict[str, Any]:
        """The request as the chat completions protocol has it, pictures as data URLs."""
        options = self.config.bootstrap.weaken
        images, turns = _shown(request)
        weaken = picture_weakener(request.weakening, options, self._image_processor)
        root = Path(self.config.data.image_root or ".")
        pictures = iter([weaken(load_image(root, image)) for image in images])
        messages: list[dict[str, Any]] = []
        for turn in turns:
            content = [
                {"type": "text", "text": part.text}
                if part.type == "text"
                else {"type": "image_url", "image_url": {"url": data_url(next(pictures))}}
                for part in turn.content
            ]
            messages.append({"role": turn.role, "content": content})
        body: dict[str, Any] = {
            "messages": messages,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
            "seed": request.weakening.seed,
        }
        if request.beginning:
            # vLLM and SGLang go on from the last message where they are told to.
            messages.append({"role": "assistant", "content": request.beginning})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body


def _shown(request: VisionRequest) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """Images and prompt as the model gets them: both without images for `no-image`."""
    if request.weakening.kind != "no-image":
        return request.images, request.prompt
    turns = tuple(Turn(turn.role, tuple(p for p in turn.content if p.type == "text")) for turn in request.prompt)
    return (), tuple(turn if turn.content else Turn(turn.role, (ContentPart("text", ""),)) for turn in turns)


def data_url(picture: Image.Image) -> str:
    """The picture as PNG, which loses nothing of the noise, in a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def special_tokens_of(encoder: Encoder) -> tuple[str, ...]:
    """Control tokens of the model as text, its image placeholder among them."""
    placeholder = encoder.tokenizer.convert_ids_to_tokens(encoder.image_token_id)
    return (*encoder.tokenizer.all_special_tokens, placeholder)
