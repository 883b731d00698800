"""Multimodal models that answer prompts about (weakened) images: in this process, or through a chat engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from bpo.bootstrap.engines.text import ChatEngine
from bpo.bootstrap.segments import Segment
from bpo.bootstrap.weaken import Weakening, picture_weakener, weaken_images
from bpo.config.training import Config, DataConfig
from bpo.data.encode import EncodedImages, EncodedPrompt, Encoder, EncodingError
from bpo.data.padding import pad_to_square
from bpo.data.processor import with_system_turn
from bpo.formats.images import data_url, load_image
from bpo.job.chat_server import Reply
from bpo.model.generate import Join, generate_prompts
from bpo.model.kv_cache import CachedPrefix, Prefixes, common_beginning
from bpo.records import ContentPart, Turn


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn: temperature 0 is greedy; `top_p` 1 and `top_k` 0 keep all tokens."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class VisionRequest:
    """A prompt about images, their weakening, and the beginning of the answer.

    Attributes:
        weakening: Its seed is also the sampling seed.
        beginning: Text that the model continues; the reply includes it.
        sampling: None for that of `bootstrap.weaken`.
        ending: Text that follows, unless the model ends its answer; the reply includes it.
        segment: The tokens of beginning and ending, for engines that take tokens.
    """

    record_id: str
    images: tuple[str, ...]
    prompt: tuple[Turn, ...]
    weakening: Weakening
    beginning: str = ""
    sampling: Sampling | None = None
    ending: str = ""
    segment: Segment | None = None


class VisionGenerator(Protocol):
    """A multimodal model. Images of a request are prepared first, possibly while the model answers other requests."""

    name: str
    whole_batches: bool
    special_tokens: tuple[str, ...]

    @property
    def encoder(self) -> Encoder | None:
        """Of `model.path`; None if the path is not set."""

    @property
    def policy(self) -> str | None:
        """Fingerprint of the weights, for the provenance; None if unknown."""

    def prepare(self, request: VisionRequest) -> Any:
        """Reads and weakens the images of a request, for `replies`. Does not use the model; thread-safe.

        Raises:
            ImageError: an image cannot be read.
        """

    def replies(self, requests: Sequence[VisionRequest], prepared: Sequence[Any]) -> Iterable[tuple[int, Reply]]:
        """(index, reply) of every request, in any order; a broken record's reply has `error` and `is_broken`."""


class TransformersVisionGenerator:
    """A transformers model in memory: one left-padded batch, sampled with a seed per record.

    Args:
        keep_prefixes: Compute a prefix that a batch has in common once, in a forward pass of its own.
    """

    whole_batches = True

    def __init__(
        self, model: Any, encoder: Encoder, config: Config, policy: str | None = None, *, keep_prefixes: bool = True
    ):
        self.model, self.encoder, self.config, self.policy = model, encoder, config, policy
        self.name = config.model.path
        self.special_tokens = special_tokens_of(encoder)
        self._cache = config.bootstrap.cache
        enabled = encoder.family.begins_from_cache and self._cache != "static" and keep_prefixes
        self._prefixes = Prefixes(model, encoder.family.generation_inputs, enabled)

    def prepare(self, request: VisionRequest) -> EncodedImages:
        weakening, encoder = request.weakening, self.encoder
        options, image_processor = self.config.bootstrap.weaken, encoder.processor.image_processor
        picture = picture_weakener(weakening, options, image_processor, encoder.padding)
        images = encoder.encode_images(_inputs_of(request)[0], picture if weakening.changes_pictures else None)
        if weakening.kind == "noise" and weakening.space == "normalised":
            assert weakening.noise_step is not None
            images = weaken_images(images, encoder.family, weakening.noise_step, weakening.seed)
        return images

    def replies(
        self, requests: Sequence[VisionRequest], prepared: Sequence[EncodedImages]
    ) -> Iterator[tuple[int, Reply]]:
        prompts: dict[int, tuple[EncodedPrompt, Join]] = {}
        batches: dict[tuple[float, float, int], list[int]] = {}
        for index, (request, images) in enumerate(zip(requests, prepared, strict=True)):
            sampling = _sampling_of(request, self.config)
            try:
                prompts[index] = self._encode(request, images)
            except EncodingError as error:
                yield index, Reply("", error=str(error), is_broken=True)
            else:
                batches.setdefault((sampling.temperature, sampling.top_p, sampling.top_k), []).append(index)
        for (temperature, top_p, top_k), indices in batches.items():
            of_batch = [prompts[index][0] for index in indices]
            answers = generate_prompts(
                self.model,
                self.encoder,
                of_batch,
                max_new_tokens=[_sampling_of(requests[index], self.config).max_new_tokens for index in indices],
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seeds=[requests[index].weakening.seed for index in indices],
                joins=[prompts[index][1] for index in indices],
                prefix=self._prefix(of_batch),
                cache=self._cache,
            )
            yield from ((index, Reply(text, ended)) for index, (text, ended) in zip(indices, answers, strict=True))

    def _prefix(self, prompts: Sequence[EncodedPrompt]) -> CachedPrefix | None:
        """The common prefix of this batch up to the first image, such as a system prompt."""
        if len(prompts) < 2:
            return None
        return self._prefixes.of(common_beginning([p.prefix_ids for p in prompts], self.encoder.image_token_id))

    def _encode(self, request: VisionRequest, images: EncodedImages) -> tuple[EncodedPrompt, Join]:
        prompt = self.encoder.encode_prompt(request.record_id, images, _inputs_of(request)[1])
        segment = request.segment
        if segment is None:
            beginning = self.encoder.encode_completion(request.beginning)[:-1] if request.beginning else ()
            segment = Segment(len(beginning), 0, beginning, ())
        prompt = replace(prompt, prefix_ids=(*prompt.prefix_ids, *segment.prefix))
        if len(prompt.prefix_ids) >= self.encoder.max_length_tokens:
            raise EncodingError(f"record {request.record_id!r}: {self.encoder.too_long(prompt)}")
        return prompt, segment.join


class ChatVisionGenerator:
    """A multimodal model behind a chat engine; weakened pictures are sent as PNG.

    Args:
        engine: A server, or vLLM in this process.
        name: Recorded in the provenance.
        policy: Fingerprint of the weights, for the provenance.
        encoder: Given if `model.path` is set; provides normalisation, padding and control tokens.

    Raises:
        ValueError: `data.image_aspect` is pad, but there is no encoder, whose mean is the colour.
    """

    whole_batches = False

    def __init__(
        self, engine: ChatEngine, config: Config, name: str, encoder: Encoder | None, policy: str | None = None
    ):
        self.engine, self.config, self.name, self.encoder, self.policy = engine, config, name, encoder, policy
        self.special_tokens = special_tokens_of(encoder) if encoder else ()
        self._image_processor = encoder.processor.image_processor if encoder else None
        self._padding = encoder.padding if encoder else None
        if config.data.image_aspect == "pad" and encoder is None:
            raise ValueError(
                "data.image_aspect is pad, but model.path is empty; set it to the served model, whose image processor "
                "gives the colour to pad with"
            )

    def replies(
        self, requests: Sequence[VisionRequest], prepared: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, Reply]]:
        bodies = [(request.record_id, body) for request, body in zip(requests, prepared, strict=True)]
        for index, reply in self.engine.replies(bodies):
            if not reply.error:
                ending = "" if reply.finished else requests[index].ending
                reply = replace(reply, text=requests[index].beginning + reply.text + ending)
            yield index, reply

    def prepare(self, request: VisionRequest) -> dict[str, Any]:
        """The request in chat completions format, with pictures as data URLs."""
        options, sampling = self.config.bootstrap.weaken, _sampling_of(request, self.config)
        images, turns = _inputs_of(request)
        weaken = picture_weakener(request.weakening, options, self._image_processor, self._padding)
        root = Path(self.config.data.image_root or ".")
        weakened = [weaken(_within_limits(load_image(root, image), self.config.data)) for image in images]
        pictures = iter([pad_to_square(picture, self._padding) if self._padding else picture for picture in weakened])
        messages: list[dict[str, Any]] = []
        for turn in with_system_turn(turns, self.config.data.system_prompt):
            content = [
                {"type": "text", "text": part.text}
                if part.type == "text"
                else {"type": "image_url", "image_url": {"url": data_url(next(pictures))}}
                for part in turn.content
            ]
            messages.append({"role": turn.role, "content": content})
        body: dict[str, Any] = {
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.weakening.seed,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if request.beginning:
            # vLLM and SGLang continue the last message with these options.
            messages.append({"role": "assistant", "content": request.beginning})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body


def _sampling_of(request: VisionRequest, config: Config) -> Sampling:
    options = config.bootstrap.weaken
    return request.sampling or Sampling(options.temperature, options.top_p, options.max_new_tokens)


def _inputs_of(request: VisionRequest) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """Images and prompt as passed to the model: both without images for `no-image`."""
    if request.weakening.kind != "no-image":
        return request.images, request.prompt
    turns = tuple(Turn(turn.role, tuple(p for p in turn.content if p.type == "text")) for turn in request.prompt)
    return (), tuple(turn if turn.content else Turn(turn.role, (ContentPart("text", ""),)) for turn in turns)


def _within_limits(picture: Image.Image, data: DataConfig) -> Image.Image:
    """The picture resized to data.min_pixels and data.max_pixels: the engine's processor has limits of its own."""
    pixels = picture.width * picture.height
    wanted = max(min(pixels, data.max_pixels or pixels), data.min_pixels)
    if wanted == pixels:
        return picture
    scale = math.sqrt(wanted / pixels)
    width, height = (max(1, math.floor(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def special_tokens_of(encoder: Encoder) -> tuple[str, ...]:
    """The model's control tokens as text, including its image placeholder."""
    placeholder = encoder.tokenizer.convert_ids_to_tokens(encoder.image_token_id)
    return (*encoder.tokenizer.all_special_tokens, placeholder)
