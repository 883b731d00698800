"""Models that judges ask: text-only language models, and multimodal ones for yes/no questions about images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from bpo.bootstrap.engines.text import ChatTextGenerator, TextGenerator, load_causal_lm
from bpo.bootstrap.inject import InjectionRequest, Message
from bpo.config.bootstrap import InjectConfig
from bpo.config.options import Section, number
from bpo.config.server import ServerConfig
from bpo.config.training import Config, missing_model
from bpo.data.encode import EncodedGroup, EncodedPrompt, EncodingError, load_encoder
from bpo.evaluation.benchmarks.pope import first_word
from bpo.evaluation.judge.prompt import JudgePrompt
from bpo.formats.images import data_url, load_image
from bpo.job.chat_server import ChatServer, Reply
from bpo.job.launch import Ranks, pick_device
from bpo.model.decoding.calibration import label_tokens
from bpo.model.group_scores import GroupScorer
from bpo.model.load import resolve_model
from bpo.model.weights import policy_fingerprint
from bpo.records import ContentPart, PreferenceGroup, Turn

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
_YES_NO = {"temperature": 0.0, "max_tokens": 8, "logprobs": True, "top_logprobs": 20}


class ReplyError(ValueError):
    """A reply that cannot be used; the group is quarantined."""


@dataclass(kw_only=True)
class LanguageOptions(Section):
    """Options of judges that can ask a text-only language model; it answers greedily.

    Attributes:
        llm: Directory (or Hub id) of a transformers causal LM.
        server: OpenAI-compatible server of a language model.
        prompt: Text file with its prompt; empty uses the one in bpo/ranking/prompts.
        max_tokens: Maximum number of tokens per reply; groups with a longer one are quarantined.
        batch_size: Number of prompts or questions that a model in this process answers at once.
    """

    where = "rank.options"

    llm: str = ""
    server: ServerConfig = field(default_factory=ServerConfig)
    prompt: str = ""
    max_tokens: int = number(1024, at_least=1)
    batch_size: int = number(16, at_least=1)


class LanguageModel:
    """A text-only language model with a prompt: on the server (kind `server`), or `llm` in this process (`model`).

    Args:
        prompt: Name of the prompt in bpo/ranking/prompts.
        fields: Its placeholders, the needed one first.

    Raises:
        ValueError: The model is not named, `llm` is not the directory of a model, or the prompt is invalid.
    """

    def __init__(self, options: LanguageOptions, ranks: Ranks, kind: str, prompt: str, fields: Sequence[str]):
        self._options, self._ranks, self._served = options, ranks, kind == "server"
        if not (options.server.url if self._served else options.llm):
            raise ValueError(f"rank.options.{'server.url' if self._served else 'llm'} is empty; name the model to ask")
        if not self._served and (fault := missing_model(options.llm)):
            raise ValueError(f"rank.options.llm is {options.llm!r}: {fault}")
        path = Path(options.prompt) if options.prompt else PROMPTS / f"{prompt}.txt"
        self._prompt = JudgePrompt.read(path, fields, fields[:1], "rank.options.prompt")

    def identity(self) -> dict[str, Any]:
        model = self._options.server.model if self._served else policy_fingerprint(self._options.llm)
        return {"language model": model, "prompt": self._prompt.template, "max_tokens": self._options.max_tokens}

    def ask(self, asked: Sequence[tuple[str, Mapping[str, str]]]) -> list[Reply]:
        """The reply to the prompt filled for each (record id, values), in order; equal prompts are asked once.

        Raises:
            ServerError: The server cannot be used.
        """
        prompts = [self._prompt.fill(values) for _, values in asked]
        record_of = {prompt: record_id for prompt, (record_id, _) in zip(prompts, asked, strict=True)}
        requests = [
            InjectionRequest(record_id, (Message("user", prompt),), "Answer:", self._options.max_tokens, seed=0)
            for prompt, record_id in record_of.items()
        ]
        size = len(requests) if self._served else self._options.batch_size
        replies: dict[str, Reply] = {}
        for start in range(0, len(requests), size or 1):
            block = requests[start : start + size]
            for index, reply in self._generator.replies(block):
                replies[block[index].messages[0].content] = reply
        return [replies[prompt] for prompt in prompts]

    @cached_property
    def _generator(self) -> TextGenerator:
        options = InjectConfig(llm=self._options.llm, temperature=0.0, top_p=1.0)
        if self._served:
            return ChatTextGenerator(ChatServer(self._options.server), options, self._options.server.model)
        return load_causal_lm(options, pick_device(self._ranks))


def text_of(reply: Reply) -> str:
    """The text of a complete reply; raises ReplyError if there is none, or it was cut off."""
    if reply.error is not None or not reply.finished:
        raise ReplyError(reply.error or f"reply cut off at rank.options.max_tokens: {reply.text[:80]!r}")
    return reply.text


class QuestionModel:
    """Answers yes/no questions about images by the probabilities of the first token, with a model in this process.

    Questions about one image share its tokens: of n questions the image and what precedes it are computed once per
    forward pass, as for the completions of a group in training.

    Args:
        path: Model or adapter directory, or Hub id; other options are those of `model`.
        answers: The texts of yes and no.
        batch_size: Number of questions per forward pass. All are about one group: results depend on no other.
    """

    def __init__(self, config: Config, ranks: Ranks, path: str, answers: Sequence[str], batch_size: int):
        if not path:
            raise ValueError("rank.options.model and model.path are both empty; set one to the model to ask")
        self._config = replace(config, model=replace(config.model, path=path))
        self._ranks, self._answers, self._batch_size = ranks, tuple(answers), batch_size

    def identity(self) -> dict[str, Any]:
        return {"asked": policy_fingerprint(self._config.model.path), **seen_by_model(self._config)}

    def yes(self, group: PreferenceGroup, questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of each question about the group's images.

        Raises:
            ImageError, EncodingError: An image cannot be read, or the chat template drops it.
        """
        scorer, labels = self._loaded
        encoder = scorer.encoder
        images, parts = encoder.encode_images(group.images), (ContentPart("image"),) * len(group.images)
        turns = [(Turn("user", (*parts, ContentPart("text", question))),) for question in questions]
        prompts = [encoder.encode_prompt(group.id, images, turn) for turn in turns]
        starts = range(0, len(prompts), self._batch_size)
        batches = [prompts[start : start + self._batch_size] for start in starts]
        packed = (((), self._packed(batch, labels, encoder.image_token_id)) for batch in batches)
        found = []
        for _, _, logp in scorer.score(packed, max_tokens=1):  # each batch is a forward pass of its own
            last = [float(values_N[-1]) for values_N in logp]
            found += [0.5 * (1 + math.tanh((yes - no) / 2)) for yes, no in zip(last[::2], last[1::2], strict=True)]
        return found

    def _packed(self, prompts: Sequence[EncodedPrompt], labels: Sequence[int], image_token_id: int) -> EncodedGroup:
        """What the prompts share as the prefix; for each its own end followed by either answer as completions."""
        shared = len(commonprefix([prompt.prefix_ids for prompt in prompts]))
        ends = [prompt.prefix_ids[shared:] for prompt in prompts]
        if any(image_token_id in end for end in ends):
            raise EncodingError(
                f"group {prompts[0].record_id!r}: the chat template puts images behind the question; set "
                "rank.options.ask to server"
            )
        prefix = replace(prompts[0], prefix_ids=prompts[0].prefix_ids[:shared])
        completions = tuple((*end, label) for end in ends for label in labels)
        return EncodedGroup(prefix, completions, (0.0,) * len(completions))

    @cached_property
    def _loaded(self) -> tuple[GroupScorer, list[int]]:
        encoder = load_encoder(self._config)
        try:
            labels = label_tokens(encoder, self._answers)
        except ValueError as error:
            raise ValueError(f"rank.options.answers: {self._answers} begin with the same token; set others") from error
        model = resolve_model(self._config.model, pick_device(self._ranks), for_training=True)
        return GroupScorer(model, encoder), labels


class QuestionServer:
    """Answers yes/no questions by a server: by log-probs of the first token, if given, or its first word."""

    def __init__(self, config: Config, server: ServerConfig, answers: Sequence[str]):
        self._root, self._server = Path(config.data.image_root or "."), ChatServer(server)
        self._words = [first_word(answer) for answer in answers]

    def identity(self) -> dict[str, Any]:
        return {"asked": self._server.options.model}

    def yes(self, group: PreferenceGroup, questions: Sequence[str]) -> list[float]:
        """As `QuestionModel.yes`; without log-probs 1 or 0.

        Raises:
            ImageError: An image cannot be read.
            ReplyError: A reply is neither yes nor no.
            ServerError: The server cannot be used.
        """
        urls = [data_url(load_image(self._root, image)) for image in group.images]
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        contents = [[*pictures, {"type": "text", "text": question}] for question in questions]
        bodies = [(group.id, {"messages": [{"role": "user", "content": content}], **_YES_NO}) for content in contents]
        found = {index: self._read(reply) for index, reply in self._server.replies(bodies)}
        return [found[index] for index in range(len(questions))]

    def _read(self, reply: Reply) -> float:
        tokens = [(first_word(token), math.exp(logp)) for token, logp in reply.first_tokens]
        p_yes, p_no = (sum(chance for word, chance in tokens if word == own) for own in self._words)
        if p_yes + p_no > 0:
            return p_yes / (p_yes + p_no)
        if reply.error is not None or first_word(reply.text) not in self._words:
            raise ReplyError(reply.error or f"reply neither {' nor '.join(self._words)}: {reply.text[:80]!r}")
        return float(first_word(reply.text) == self._words[0])


def seen_by_model(config: Config) -> dict[str, Any]:
    """Options, in addition to weights, on which a multimodal model's view of a group depends."""
    names = ("max_length_tokens", "min_pixels", "max_pixels", "image_aspect", "system_prompt")
    return {"model.dtype": config.model.dtype} | {f"data.{name}": getattr(config.data, name) for name in names}
