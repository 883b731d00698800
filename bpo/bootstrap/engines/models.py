"""The models of a bootstrapping job, loaded on demand; at most one is in memory at a time."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import replace
from typing import Any, Literal

import torch

from bpo.bootstrap.engines.text import (
    ChatEngine,
    ChatTextGenerator,
    MultimodalTextGenerator,
    TextGenerator,
    load_causal_lm,
)
from bpo.bootstrap.engines.vision import ChatVisionGenerator, TransformersVisionGenerator, VisionGenerator
from bpo.bootstrap.engines.vllm import VllmEngine, check_servable
from bpo.config.adapter import split_adapter
from bpo.config.server import ServerConfig
from bpo.config.training import Config
from bpo.data.encode import Encoder, load_encoder
from bpo.job.chat_server import ChatServer
from bpo.job.launch import Ranks, pick_device
from bpo.model.group_scores import GroupScorer
from bpo.model.load import load_model, resolve_model
from bpo.model.weights import policy_fingerprint

logger = logging.getLogger(__name__)


class Generators:
    """Builds the generators of one job on one rank, each once.

    Attributes:
        encoder: Of `model.path`; None if the path is not set.
        policy: Fingerprint of `model.path`, for a server the local copy of what it serves; None if it is not set.
    """

    def __init__(self, config: Config, ranks: Ranks, max_images: int):
        self.config, self._ranks, self._max_images = config, ranks, max_images
        self.encoder: Encoder | None = load_encoder(config) if config.model.path else None
        self.policy = policy_fingerprint(config.model.path) if config.model.path else None
        self._base, self._adapter = split_adapter(config.model)
        self._loaded: Any = None
        self._vision: VisionGenerator | None = None
        self._text: TextGenerator | None = None

    def vision(self) -> VisionGenerator:
        """The multimodal model for prompts about images."""
        if self._vision is None:
            self._vision = self._build_vision()
        return self._vision

    def text(self) -> TextGenerator:
        """The text-only LLM of `bootstrap.inject`: on a server, a separate model, or the multimodal model's own."""
        if self._text is None:
            self._text = self._build_text()
        return self._text

    def scorer(self) -> GroupScorer:
        """The multimodal model for probabilities of given answers, in place of any other in memory."""
        self._release()
        model = resolve_model(self.config.model, pick_device(self._ranks), for_training=True)
        return GroupScorer(model, self._required_encoder())

    def _build_vision(self) -> VisionGenerator:
        engine = self.config.bootstrap.vision.engine
        if engine == "transformers":
            model, encoder = self._multimodal_model(), self._required_encoder()
            return TransformersVisionGenerator(model, encoder, self.config, self.policy)
        name = self._vision_model_name()
        return ChatVisionGenerator(self._chat_engine(), self.config, name, self.encoder, self.policy)

    def _build_text(self) -> TextGenerator:
        options, cache = self.config.bootstrap.inject, self.config.bootstrap.cache
        if options.server.url:
            return ChatTextGenerator(ChatServer(options.server), options, options.server.model)
        if options.llm:
            self._release()
            if options.engine == "vllm":
                dtype = "auto" if options.dtype == "config" else options.dtype
                engine = VllmEngine(options.llm, dtype, self._ranks.local_rank, max_images=0)
                return ChatTextGenerator(engine, options, options.llm)
            return load_causal_lm(options, pick_device(self._ranks), cache)
        if self.config.bootstrap.vision.engine == "transformers":
            encoder, name = self._required_encoder(), self.config.model.path
            return MultimodalTextGenerator(self._multimodal_model(), encoder, options, name, cache, self.policy)
        system_prompt = self.config.data.system_prompt
        name = self._vision_model_name()
        return ChatTextGenerator(self._chat_engine(), options, name, system_prompt, self.policy)

    def _vision_model_name(self) -> str:
        is_served = self.config.bootstrap.vision.engine == "server"
        return self._server_options().model if is_served else self.config.model.path

    def _server_options(self) -> ServerConfig:
        """An adapter is served under the name of its fingerprint, so that no other one answers."""
        server = self.config.bootstrap.vision.server
        return replace(server, model=f"bpo-{self.policy}") if self._adapter else server

    def _multimodal_model(self) -> Any:
        if self._loaded is None:
            self._loaded = load_model(self.config.model, pick_device(self._ranks))
        return self._loaded

    def _chat_engine(self) -> ChatEngine:
        if self._loaded is None and self.config.bootstrap.vision.engine == "server":
            self._loaded = self._connected()
        elif self._loaded is None:
            dtype = "auto" if self.config.model.dtype == "config" else self.config.model.dtype
            rank, path = self._ranks.local_rank, self._base.path
            self._loaded = VllmEngine(path, dtype, rank, self._max_images, self._adapter)
        return self._loaded

    def _connected(self) -> ChatServer:
        """The server, which has loaded the adapter and names the policy among its models if `model.path` is set."""
        if self._adapter:
            check_servable(self._adapter)
        server = ChatServer(self._server_options())
        if self._adapter:
            server.load_adapter(os.path.abspath(self._adapter))
        if self.policy is not None:
            server.check_served()
        return server

    def _release(self) -> None:
        self._loaded = self._vision = self._text = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _required_encoder(self) -> Encoder:
        assert self.encoder is not None, "required_paths() requires model.path in this case"
        return self.encoder


def required_paths(config: Config) -> dict[str, str]:
    """Dotted option -> value of every path that the job requires."""
    options = config.bootstrap
    needed = {"data.annotations": config.data.annotations, "data.groups": config.data.groups}
    in_process = options.vision.engine != "server"
    own_lm = "inject" in options.sources and not (options.inject.llm or options.inject.server.url)
    own_features = "swap" in options.sources and options.swap.nearest == "image"
    own_tokens = "segment" in options.sources
    if own_features or own_tokens or (in_process and (own_lm or set(options.queued_sources) - {"inject"})):
        needed["model.path"] = config.model.path
    return needed


def batch_size(config: Config, source: str) -> int:
    """Records generated together: servers and vLLM need large batches, as outcomes are written between batches."""
    options, engine = config.bootstrap, engine_of(config, source)
    if engine == "server":
        inject = options.inject.server
        server = inject if source == "inject" and inject.url else options.vision.server
        return _SERVER_BATCH_FACTOR * server.concurrency
    return max(options.batch_size, _VLLM_BATCH) if engine == "vllm" else options.batch_size


def engine_of(config: Config, source: str) -> Literal["transformers", "vllm", "server"]:
    """The inference engine of a source."""
    inject = config.bootstrap.inject
    if source == "inject" and inject.server.url:
        return "server"
    return inject.engine if source == "inject" and inject.llm else config.bootstrap.vision.engine


def num_prepare_threads(config: Config) -> int:
    """Number of threads that prepare images during generation.

    PyTorch releases the GIL in every operation and must reacquire it: with several threads contending for it, a small
    model was slower by one sixth (`bpo bench bootstrap`).
    """
    options = config.bootstrap
    if options.num_workers is not None:
        return options.num_workers
    vision_here = options.vision.engine == "transformers" and bool(set(options.queued_sources) - {"inject"})
    text_here = "inject" in options.sources and not options.inject.server.url and options.inject.engine != "vllm"
    if text_here and not options.inject.llm:
        text_here = options.vision.engine == "transformers"
    return _THREADS_WITH_LOCAL_MODEL if vision_here or text_here else _THREADS_WITHOUT_LOCAL_MODEL


_THREADS_WITH_LOCAL_MODEL, _THREADS_WITHOUT_LOCAL_MODEL = 1, 8
# Records per batch over concurrent requests: several, to keep the server busy until the end of the batch.
_SERVER_BATCH_FACTOR = 8
# vLLM forms its own batches from the records of one call.
_VLLM_BATCH = 1024
