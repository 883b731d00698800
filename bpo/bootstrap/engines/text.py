"""Text-only LLMs that inject errors: any transformers causal LM, or the multimodal model's own language model.

A generator returns a reply for each request of a batch. `ChatTextGenerator` forwards requests to a server
(`bpo/job/chat_server.py`) or to vLLM (`bpo/bootstrap/engines/vllm.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bpo.bootstrap.inject import InjectionRequest, Message, as_plain_text
from bpo.config.bootstrap import CacheKind, InjectConfig
from bpo.config.training import missing_model
from bpo.data.encode import EncodedPrompt, Encoder, EncodingError
from bpo.data.processor import render_template
from bpo.job.chat_server import Reply
from bpo.model.generate import generate_ids, generate_prompts
from bpo.model.kv_cache import CachedPrefix, Prefixes, common_beginning
from bpo.records import ContentPart, Turn

logger = logging.getLogger(__name__)


class ChatEngine(Protocol):
    """Answers requests in chat completions format."""

    def replies(self, bodies: Sequence[tuple[str, dict[str, Any]]]) -> Iterable[tuple[int, Reply]]:
        """(index, reply) of each (record id, body), in order of completion."""


class TextGenerator(Protocol):
    """A text-only LLM."""

    name: str
    whole_batches: bool
    special_tokens: tuple[str, ...]

    @property
    def policy(self) -> str | None:
        """Fingerprint of the weights, if they are the multimodal model's."""

    def replies(self, requests: Sequence[InjectionRequest]) -> Iterable[tuple[int, Reply]]:
        """(index of the request, reply) of every request, in any order; a reply depends only on its request.

        Replies yielded before an error remain valid.
        """


class ExamplePrefixes:
    """Computes the keys and values of instruction and examples, most of every request, once for all requests.

    Args:
        encode: Token ids of a request.
    """

    def __init__(self, prefixes: Prefixes, encode: Callable[[InjectionRequest], Sequence[int]]):
        self._prefixes, self._encode = prefixes, encode
        self._ids: dict[tuple[Message, ...], tuple[int, ...]] = {}

    def by_prefix(
        self, requests: Sequence[InjectionRequest], prompts: Sequence[Sequence[int]]
    ) -> list[tuple[CachedPrefix | None, list[int]]]:
        """Groups the requests' indices by cached prefix; `prompts` are their token ids."""
        groups: dict[int, tuple[CachedPrefix | None, list[int]]] = {}
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            prefix = self._prefixes.of(self._shared_ids(request))
            if prefix is not None and not prefix.begins(prompt):
                prefix = None
            groups.setdefault(id(prefix), (prefix, []))[1].append(index)
        return list(groups.values())

    def _shared_ids(self, request: InjectionRequest) -> tuple[int, ...]:
        examples = request.messages[:-1]
        if examples not in self._ids:
            # Two requests with different first characters share only the examples.
            ends = (Message("user", text) for text in ("A", "0"))
            self._ids[examples] = common_beginning(
                [self._encode(replace(request, messages=(*examples, end))) for end in ends]
            )
        return self._ids[examples]


class TransformersTextGenerator:
    """A causal LM in memory: batched, left-padded, sampled with a seed per request.

    With a chat template, the worked examples are turns; without one, the model continues plain text. The keys and
    values of instruction and examples, most of every prompt, are computed once and reused.

    Args:
        model: From `AutoModelForCausalLM`, in eval mode.
        tokenizer: Its tokenizer.
        name: Recorded in the provenance of its completions.
        cache: The kind of KV cache: see `bpo/model/kv_cache.py`.
    """

    whole_batches = True
    policy = None  # of another model

    def __init__(self, model: Any, tokenizer: Any, options: InjectConfig, name: str, cache: CacheKind = "reserved"):
        self.model, self.tokenizer, self.options, self.name, self.cache = model, tokenizer, options, name, cache
        self.special_tokens = tuple(tokenizer.all_special_tokens)
        self._eos_ids = _eos_ids(model, tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._control = {str(token): index for index, token in added.items() if token.special}
        self._control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._suppressed = sorted(set(self._control.values()) - set(self._eos_ids))
        self._examples = ExamplePrefixes(Prefixes(model, enabled=cache != "static"), self.encode)

    def replies(self, requests: Sequence[InjectionRequest]) -> Iterator[tuple[int, Reply]]:
        prompts = [self.encode(request) for request in requests]
        for prefix, indices in self._examples.by_prefix(requests, prompts):
            answers = self._generate([requests[i] for i in indices], [prompts[i] for i in indices], prefix)
            yield from zip(indices, answers, strict=True)

    def _generate(
        self, requests: Sequence[InjectionRequest], prompts: Sequence[Sequence[int]], prefix: CachedPrefix | None
    ) -> list[Reply]:
        answers = generate_ids(
            self.model,
            prompts,
            pad_token_id=self._eos_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            eos_token_ids=self._eos_ids,
            suppressed_token_ids=self._suppressed,
            max_new_tokens=[request.max_new_tokens for request in requests],
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            seeds=[request.seed for request in requests],
            prefix=prefix,
            cache=self.cache,
        )
        return [Reply(self.tokenizer.decode(ids, skip_special_tokens=True), ended) for ids, ended in answers]

    def encode(self, request: InjectionRequest) -> list[int]:
        """Token ids of a request; control tokens spelled in its text lose their brackets."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(self._disarm(as_plain_text(request)))["input_ids"])
        messages = [{"role": m.role, "content": self._disarm(m.content)} for m in request.messages]
        rendered = render_template(self.tokenizer, None, messages, f"{self.name}: the tokenizer")
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _disarm(self, text: str) -> str:
        for token in self._control:
            text = text.replace(token, token.strip("<>[]|/ "))
        return text


class MultimodalTextGenerator:
    """The multimodal model's own language model, prompted without images through its chat template."""

    whole_batches = True

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        options: InjectConfig,
        name: str,
        cache: CacheKind = "reserved",
        policy: str | None = None,
    ):
        self.model, self.encoder, self.options, self.name, self.cache = model, encoder, options, name, cache
        self.policy = policy
        self.special_tokens = tuple(encoder.tokenizer.all_special_tokens)
        prefixes = Prefixes(model, encoder.family.generation_inputs, enabled=cache != "static")
        self._examples = ExamplePrefixes(prefixes, lambda request: self._encode(request).prefix_ids)

    def replies(self, requests: Sequence[InjectionRequest]) -> Iterator[tuple[int, Reply]]:
        prompts = [self._encode(request) for request in requests]
        for prefix, indices in self._examples.by_prefix(requests, [prompt.prefix_ids for prompt in prompts]):
            answers = generate_prompts(
                self.model,
                self.encoder,
                [prompts[index] for index in indices],
                max_new_tokens=[requests[index].max_new_tokens for index in indices],
                temperature=self.options.temperature,
                top_p=self.options.top_p,
                seeds=[requests[index].seed for index in indices],
                prefix=prefix,
                cache=self.cache,
            )
            yield from ((index, Reply(text, ended)) for index, (text, ended) in zip(indices, answers, strict=True))

    def _encode(self, request: InjectionRequest) -> EncodedPrompt:
        prompt = self.encoder.encode_prompt(request.record_id, (), _turns(request))
        if self.encoder.image_token_id in prompt.prefix_ids:
            raise EncodingError(f"record {prompt.record_id!r}: a text-only prompt contains image tokens")
        return prompt


class ChatTextGenerator:
    """A text-only LLM behind a chat engine: a server, or vLLM in this process.

    Args:
        system_prompt: System turn of every request; empty adds none.
        policy: Fingerprint of the weights, if they are the multimodal model's.
    """

    whole_batches = False
    special_tokens: tuple[str, ...] = ()

    def __init__(
        self, engine: ChatEngine, options: InjectConfig, name: str, system_prompt: str = "", policy: str | None = None
    ):
        self.engine, self.options, self.name, self.policy = engine, options, name, policy
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def replies(self, requests: Sequence[InjectionRequest]) -> Iterable[tuple[int, Reply]]:
        return self.engine.replies([(request.record_id, self.body(request)) for request in requests])

    def body(self, request: InjectionRequest) -> dict[str, Any]:
        """One request in chat completions format."""
        return {
            "messages": [*self._system, *({"role": m.role, "content": m.content} for m in request.messages)],
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
        }


def load_causal_lm(
    options: InjectConfig, device: torch.device, cache: CacheKind = "reserved"
) -> TransformersTextGenerator:
    """Loads `options.llm` (a directory or hub id; `options.gguf_file` names a GGUF file in it) for generation.

    Raises:
        ValueError: The directory or the GGUF file does not exist, or the model is not a decoder-only LM.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    if gguf and not (Path(options.llm) / options.gguf_file).is_file():
        raise ValueError(
            f"bootstrap.inject.gguf_file: {Path(options.llm) / options.gguf_file} does not exist; "
            "name a .gguf file in bootstrap.inject.llm"
        )
    dtype = "auto" if options.dtype == "config" else getattr(torch, options.dtype)
    logger.info("loading the text-only LLM %s", options.llm)
    if not gguf and (fault := missing_model(options.llm)):
        raise ValueError(f"bootstrap.inject.llm is {options.llm!r}: {fault}")
    tokenizer = AutoTokenizer.from_pretrained(options.llm, **gguf)
    model = AutoModelForCausalLM.from_pretrained(options.llm, dtype=dtype, **gguf, **_dense_weights(bool(gguf)))
    name = f"{options.llm}/{options.gguf_file}" if gguf else options.llm
    return TransformersTextGenerator(model.to(device).eval(), tokenizer, options, name, cache)


def _dense_weights(is_gguf: bool) -> dict[str, Any]:
    """Options that dequantize GGUF weights at load time; otherwise every batch would dequantize them again.

    transformers releases without `GgufConfig` always dequantize.
    """
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config_class(dequantize=True)} if is_gguf and config_class else {}


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: chat models often end a turn with another token than a document."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    found = list(dict.fromkeys(index for index in [tokenizer.eos_token_id, *ids] if index is not None))
    if not found:
        raise ValueError("the text-only LLM has no EOS token; set tokenizer.eos_token to the token that ends an answer")
    return found


def _turns(request: InjectionRequest) -> tuple[Turn, ...]:
    return tuple(Turn(m.role, (ContentPart("text", m.content),)) for m in request.messages)
