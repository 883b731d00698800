"""Encodes records as token ids: chat template, image tokens, truncation. Does not use the model.

Shape letters: T tokens of one prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from bpo.config.adapter import split_adapter
from bpo.config.training import Config
from bpo.data.chat import ChatTokenizer, control_tokens_of, end_of_answer
from bpo.data.families import Family, ImagePlace, family_of
from bpo.data.padding import pad_to_square, visible_share
from bpo.data.processor import ChatTemplateError, Processor, load_processor, with_system_turn
from bpo.formats.images import ImageError, load_image
from bpo.formats.usable import NO_PAIR, distinct_answers
from bpo.records import Completion, PreferenceGroup, Turn

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Side length of the stand-in image: the smallest that Qwen-VL's processors do not upscale.
STAND_IN_PIXELS = 56


class EncodingError(ValueError):
    """A record that cannot be encoded; the message names the record and the fix."""


@dataclass(frozen=True, slots=True)
class EncodedImages:
    """Model inputs of the images of one prompt, and the text and token counts that represent each in the prompt."""

    inputs: dict[str, torch.Tensor]
    places: tuple[ImagePlace, ...]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A tokenized prompt with expanded image placeholders, up to the start of the answer; `turns` as given."""

    record_id: str
    prefix_ids: tuple[int, ...]
    image_inputs: dict[str, torch.Tensor]
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedView:
    """A prompt with the group's images changed, or another prompt about them.

    completion_ids: of the view's own completions; empty if the group's are scored under it.
    """

    name: str
    prompt: EncodedPrompt
    completion_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """A prompt with its distinct completions (each ends with EOS unless truncated), their scores and weights.

    weights, betas: one per completion, or empty for 1.
    token_weights: per completion, the weight of each token; empty for 1.
    described: per completion, the view that it describes (`Completion.view`), or empty for the group's images.
    paired, explored: per completion, its flags, or empty if all are the default (`Completion`).
    views: further views of the group.
    """

    prompt: EncodedPrompt
    completion_ids: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    weights: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    token_weights: tuple[tuple[float, ...], ...] = ()
    described: tuple[str, ...] = ()
    views: tuple[EncodedView, ...] = ()
    paired: tuple[bool, ...] = ()
    explored: tuple[bool, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the group if its completions share the prefix."""
        return len(self.prompt.prefix_ids) + sum(len(ids) for ids in self.completion_ids)

    @property
    def longest_tokens(self) -> int:
        """Number of tokens of the prefix plus the longest completion."""
        return len(self.prompt.prefix_ids) + max(len(ids) for ids in self.completion_ids)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group unusable for training, with the reason. Dropped groups are counted and listed."""

    group_id: str
    reason: str
    detail: str


class Encoder:
    """Encodes prompts and groups for one processor.

    Args:
        processor: Tokenizer, image processor and chat template of the model.
        model_config: The model's transformers config; determines the family.
        image_root: Base folder of the images.
        max_length_tokens: Maximum length of prefix plus one completion.
        share_prefix: Value of `model.share_prefix`.
        image_aspect: Value of `data.image_aspect`.
        system_prompt: Value of `data.system_prompt`.

    Raises:
        ValueError: The tokenizer has no EOS token or does not fit the model; the family does not take padded images;
            the chat template has no system turn.
    """

    def __init__(
        self,
        processor: Processor,
        model_config: Any,
        image_root: Path,
        max_length_tokens: int,
        share_prefix: str = "auto",
        image_aspect: str = "processor",
        system_prompt: str = "",
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.family: Family = family_of(model_config, share_prefix)
        self.padding = self.family.padding_colour(processor.image_processor) if image_aspect == "pad" else None
        self.system_prompt = system_prompt
        self.image_root = image_root
        self.max_length_tokens = max_length_tokens
        self.image_token_id = self.family.image_token_id
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token to the token that ends an answer")
        _check_ids(self.tokenizer, model_config, self.image_token_id)
        control_tokens = control_tokens_of(self.tokenizer, self.family.control_token_ids())
        self.eos_token_id: int = end_of_answer(
            processor, set(control_tokens.values()) - {self.tokenizer.bos_token_id, self.image_token_id}
        )
        # A model may end turns and documents with different tokens; in generation, both end the answer.
        self.end_token_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos_token_id, self.tokenizer.eos_token_id]))
        pad = self.tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        special_ids = set(control_tokens.values()) | set(self.tokenizer.all_special_ids)
        self.suppressed_token_ids: tuple[int, ...] = tuple(sorted(special_ids - set(self.end_token_ids)))
        self._placeholder = self.family.placeholder(self.tokenizer)
        self._chat = ChatTokenizer(processor, control_tokens, special_ids | set(self.end_token_ids))
        if system_prompt:
            processor.check_system_turn()

    def encode_prompt(
        self,
        record_id: str,
        images: Sequence[str] | EncodedImages,
        prompt: Sequence[Turn],
    ) -> EncodedPrompt:
        """Applies the chat template with a generation prompt and expands each image placeholder.

        A prompt that ends with an assistant turn is rendered up to the end of this turn's text, the start of the
        answer; no end-of-turn token follows. Start and completion are tokenized apart, so a start should end where a
        token ends: a space between them belongs to the completion.

        Args:
            images: Paths, or the result of `encode_images` for them.

        Raises:
            EncodingError: The numbers of images and image parts differ; the template fails, drops or adds an image, or
                drops the start.
            ImageError: An image cannot be read.
        """
        expected = sum(turn.num_images for turn in prompt)
        if expected != len(images):
            raise EncodingError(f"record {record_id!r}: the prompt has {expected} image parts but {len(images)} images")
        encoded = images if isinstance(images, EncodedImages) else self.encode_images(images)
        try:
            pieces, literals = self._chat.render(with_system_turn(prompt, self.system_prompt))
        except ChatTemplateError as error:
            raise EncodingError(f"record {record_id!r}: {error}") from error
        found = sum(piece.count(self._placeholder) for piece in pieces[::2])
        if found != expected:
            raise EncodingError(
                f"record {record_id!r}: the chat template wrote {found} image "
                f"placeholders for {expected} images; use a processor whose template supports structured content"
            )
        # Expanded in the text, not in its tokens: text around an image may be merged with adjacent text into one token.
        texts = iter([place.text for place in encoded.places])
        for index in range(0, len(pieces), 2):
            parts = pieces[index].split(self._placeholder)
            pieces[index] = parts[0] + "".join(next(texts) + part for part in parts[1:])
        runs = iter([run for place in encoded.places for run in place.runs])
        prefix_ids: list[int] = []
        for token in self._chat.tokenize(pieces, literals):
            prefix_ids.extend([token] * next(runs) if token == self.image_token_id else [token])
        return EncodedPrompt(record_id, tuple(prefix_ids), encoded.inputs, tuple(prompt))

    def encode_images(
        self, images: Sequence[str], change: Callable[[Image.Image], Image.Image] | None = None
    ) -> EncodedImages:
        """Decodes and preprocesses the images of one prompt. Thread-safe; does not use the tokenizer.

        Args:
            change: Transform applied to every image before it is padded and passed to the image processor.

        Raises:
            ImageError: An image cannot be read, or the processor rejects its shape.
        """
        pictures = self.open_pictures(images)
        if change is not None:
            pictures = [change(picture) for picture in pictures]
        return self.encode_pictures(pictures, images)

    def open_pictures(self, images: Sequence[str]) -> list[Image.Image]:
        """Decodes images; raises ImageError if one cannot be read."""
        return [load_image(self.image_root, image) for image in images]

    def encode_pictures(self, pictures: list[Image.Image], images: Sequence[str]) -> EncodedImages:
        """Preprocesses the decoded (and perhaps changed) images of one prompt.

        Args:
            images: Their paths, for messages.

        Raises:
            ImageError: The processor rejects their shape.
        """
        if not pictures:
            return EncodedImages({}, ())
        if self.padding is not None:
            pictures = [pad_to_square(picture, self.padding) for picture in pictures]
        try:
            inputs, places = self.family.preprocess(self.processor, pictures)
        except ValueError as error:
            sizes = ", ".join(f"{p.width}x{p.height}" for p in pictures)
            raise ImageError(f"{', '.join(images)}: rejected by the image processor ({sizes} px): {error}") from error
        return EncodedImages(inputs, tuple(places))

    def stand_in(self) -> EncodedPrompt:
        """Returns the image tokens and pixels of a small black image without a prompt; see `collate_groups`."""
        picture = Image.new("RGB", (STAND_IN_PIXELS, STAND_IN_PIXELS))
        image_inputs, (place,) = self.family.preprocess(self.processor, [picture], smallest=True)
        return EncodedPrompt("stand-in", (self.image_token_id,) * sum(place.runs), image_inputs)

    def encode_completion(self, response: str) -> tuple[int, ...]:
        """Encodes an answer and its end token; control tokens spelled in it are plain text."""
        return (*self._chat.plain(response), self.eos_token_id)

    def encode_group(
        self, group: PreferenceGroup, images: EncodedImages | None = None, longest_prefix: int = 0
    ) -> EncodedGroup | Dropped:
        """Encodes a group; completions are truncated to `max_length_tokens`, prompt and images are not.

        Completions with equal tokens are merged, keeping the higher score, because they do not form a pair.

        Args:
            images: The encoded images of the group, if they are at hand.
            longest_prefix: Tokens of the longest prefix under which the completions are scored, if that is another one:
                they are truncated alike under all.

        Returns:
            The encoded group, or `Dropped` if the prompt leaves no room or no pair is left.

        Raises:
            EncodingError: See `encode_prompt`; or weights of characters need another tokenizer.
            ImageError: An image cannot be read.
        """
        prompt = self.encode_prompt(group.id, group.images if images is None else images, group.prompt)
        room = self.max_length_tokens - max(len(prompt.prefix_ids), longest_prefix)
        if room < 1:
            return Dropped(group.id, "prompt-too-long", self.too_long(prompt, longest_prefix))
        best = distinct_answers(group.completions, lambda c: self.encode_completion(c.response)[:room])
        if best is None:
            return Dropped(group.id, *NO_PAIR)
        kept = [completion for _, completion in best]
        return EncodedGroup(
            prompt,
            tuple(ids for ids, _ in best),
            tuple(completion.score for completion in kept),
            tuple(completion.weight for completion in kept),
            _unless_all([completion.beta for completion in kept], 1.0),
            self._token_weights(group.id, best),
            _unless_all([completion.view for completion in kept], ""),
            paired=_unless_all([completion.paired for completion in kept], True),
            explored=_unless_all([completion.explored for completion in kept], False),
        )

    def _token_weights(
        self, record_id: str, answers: Sequence[tuple[tuple[int, ...], Completion]]
    ) -> tuple[tuple[float, ...], ...]:
        """The weight of each token of each answer, 1 for its end token; empty if all weights are 1."""
        weights = []
        for ids, completion in answers:
            of_tokens: list[float] = []
            if completion.token_weights:
                try:
                    of_tokens = self._chat.plain_weights(completion.response, completion.token_weights)
                except ValueError as error:
                    raise EncodingError(f"record {record_id!r}: {error}") from error
            weights.append(tuple([*of_tokens, *[1.0] * len(ids)][: len(ids)]))
        return () if all(weight == 1 for of_tokens in weights for weight in of_tokens) else tuple(weights)

    def encode_auxiliary(
        self, group: PreferenceGroup, images: EncodedImages
    ) -> list[tuple[EncodedPrompt, tuple[int, ...]]]:
        """Encodes the auxiliary prompts of a group, each with the tokens of its answer, truncated to its own room.

        Args:
            images: The encoded images of the group.

        Raises:
            EncodingError: A prompt leaves no room for its answer; see also `encode_prompt`.
        """
        encoded = []
        for number, entry in enumerate(group.auxiliary):
            prompt = self.encode_prompt(group.id, images, entry.prompt)
            room = self.max_length_tokens - len(prompt.prefix_ids)
            if room < 1:
                raise EncodingError(f"record {group.id!r}: auxiliary[{number}]: {self.too_long(prompt)}")
            encoded.append((prompt, self.encode_completion(entry.response)[:room]))
        return encoded

    def too_long(self, prompt: EncodedPrompt, longest_prefix: int = 0) -> str:
        """Says how long a prompt (or, if longer, a view of it) is that leaves no room, and which options make room."""
        num_tokens = len(prompt.prefix_ids)
        if num_tokens < longest_prefix:
            return (
                f"a view of the prompt takes {longest_prefix} of {self.max_length_tokens} tokens; raise "
                f"data.max_length_tokens={self.max_length_tokens}"
            )
        text = (
            f"the prompt takes {num_tokens} of {self.max_length_tokens} tokens, "
            f"{prompt.prefix_ids.count(self.image_token_id)} of them for images; raise "
            f"data.max_length_tokens={self.max_length_tokens}"
        )
        pixels = self.family.pixel_limits(self.processor.image_processor)
        return f"{text}, or lower data.max_pixels={pixels[1]}" if pixels and prompt.image_inputs else text

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _unless_all(values: Sequence[T], default: T) -> tuple[T, ...]:
    """The values, or an empty tuple if all are the default."""
    return () if all(value == default for value in values) else tuple(values)


def _check_ids(tokenizer: Any, model_config: Any, image_token_id: int) -> None:
    """Raises ValueError if a token has no row in the embedding, or the image token is not in the tokenizer."""
    if tokenizer.convert_ids_to_tokens(image_token_id) is None:
        raise ValueError(
            f"the model's image token has id {image_token_id} (config.json), which the tokenizer lacks; use the "
            "model's own tokenizer"
        )
    num_rows = model_config.get_text_config().vocab_size
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= num_rows:
        raise ValueError(
            f"token {token!r} of the tokenizer has id {index}, but the model's embedding has {num_rows} rows "
            "(vocab_size); use the model's own tokenizer, or save the model after "
            f"model.resize_token_embeddings({index + 1})"
        )


def load_encoder(config: Config, model_config: Any = None) -> Encoder:
    """Loads the processor from `model.path` (of an adapter: from its base), and the model's config if not given."""
    from transformers import AutoConfig

    if not config.model.path:
        raise ValueError("model.path is empty; set it to the directory (or Hub id) of the model")
    options, data = split_adapter(config.model)[0], config.data
    trust = options.trust_remote_code
    processor = load_processor(options.path, trust_remote_code=trust)
    model_config = model_config or AutoConfig.from_pretrained(options.path, trust_remote_code=trust)
    if data.min_pixels or data.max_pixels:
        family_of(model_config).limit_pixels(processor.image_processor, data.min_pixels, data.max_pixels)
    encoder = Encoder(
        processor,
        model_config,
        Path(data.image_root or "."),
        data.max_length_tokens,
        config.model.share_prefix,
        data.image_aspect,
        data.system_prompt,
    )
    seen = visible_share(processor.image_processor, 4, 3, padded=encoder.padding is not None)
    logger.info("data.image_aspect=%s: the model sees %.0f %% of a 4:3 photo", data.image_aspect, 100 * seen)
    return encoder
