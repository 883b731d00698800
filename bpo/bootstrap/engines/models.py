"""The models that a bootstrapping job needs, loaded when a source asks for them; one is in memory at a time."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch

from bpo.bootstrap.engines.server import ChatServer
from bpo.bootstrap.engines.text import ChatEngine, ChatGenerator, OwnLanguageModel, TextGenerator, load_causal_lm
from bpo.bootstrap.engines.vision import ChatVision, TransformersVision, VisionGenerator
from bpo.bootstrap.engines.vllm import VllmEngine
from bpo.config.training import Config
from bpo.data.encode import Encoder, load_encoder
from bpo.job.launch import Ranks, pick_device
from bpo.model.load import load_model

logger = logging.getLogger(__name__)


class Engines:
    """Makes the generators of one job on one rank.

    Attributes:
        encoder: Of `model.path`; None where no path is given.
    """

    def __init__(self, config: Config, ranks: Ranks, max_images: int):
        self.config, self._ranks, self._max_images = config, ranks, max_images
        self.encoder: Encoder | None = load_encoder(config) if config.model.path else None
        self._held: Any = None

    def vision(self) -> VisionGenerator:
        """The multimodal model, answering prompts about images."""
        engine = self.config.bootstrap.vision.engine
        if engine == "transformers":
            return TransformersVision(self._multimodal(), self._required_encoder(), self.config)
        return ChatVision(self._chat(), self.config, self._vision_name(), self.encoder)

    def text(self) -> TextGenerator:
        """The text-only LLM of `bootstrap.inject`: a server's, one of its own, or the multimodal model's."""
        options, cache = self.config.bootstrap.inject, self.config.bootstrap.cache
        if options.server.url:
            return ChatGenerator(ChatServer(options.server), options, options.server.model)
        if options.llm:
            self._release()
            if options.engine == "vllm":
                dtype = "auto" if options.dtype == "config" else options.dtype
                engine = VllmEngine(options.llm, dtype, self._ranks.local_rank, max_images=0)
                return ChatGenerator(engine, options, options.llm)
            return load_causal_lm(options, pick_device(self._ranks), cache)
        if self.config.bootstrap.vision.engine == "transformers":
            encoder, name = self._required_encoder(), self.config.model.path
            return OwnLanguageModel(self._multimodal(), encoder, options, name, cache)
        return ChatGenerator(self._chat(), options, self._vision_name())

    def _vision_name(self) -> str:
        vision = self.config.bootstrap.vision
        return vision.server.model if vision.engine == "server" else self.config.model.path

    def _multimodal(self) -> Any:
        if self._held is None:
            self._held = load_model(self.config.model, pick_device(self._ranks))
        return self._held

    def _chat(self) -> ChatEngine:
        vision = self.config.bootstrap.vision
        if vision.engine == "server":
            return ChatServer(vision.server)
        if self._held is None:
            dtype = "auto" if self.config.model.dtype == "config" else self.config.model.dtype
            self._held = VllmEngine(self.config.model.path, dtype, self._ranks.local_rank, self._max_images)
        return self._held

    def _release(self) -> None:
        self._held = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _required_encoder(self) -> Encoder:
        assert self.encoder is not None, "`check_paths` requires model.path for this"
        return self.encoder


def needed_paths(config: Config) -> dict[str, str]:
    """Dotted option -> value of every path that the job cannot do without."""
    options = config.bootstrap
    needed = {"data.annotations": config.data.annotations, "data.groups": config.data.groups}
    in_process = options.vision.engine != "server"
    own_lm = "inject" in options.sources and not (options.inject.llm or options.inject.server.url)
    if in_process and (own_lm or set(options.sources) != {"inject"}):
        needed["model.path"] = config.model.path
    return needed


def batch_size(config: Config, source: str) -> int:
    """Records that are generated together: a server and vLLM want many at a time between our writes."""
    options = config.bootstrap
    is_text = source == "inject"
    own = is_text and not (options.inject.llm or options.inject.server.url)
    server = options.inject.server if is_text and not own else options.vision.server
    if server.url:
        return _SERVER_BATCHES * server.concurrency
    uses_vllm = options.inject.engine == "vllm" if is_text and not own else options.vision.engine == "vllm"
    return max(options.batch_size, _VLLM_BATCH) if uses_vllm else options.batch_size


def preparing_threads(config: Config) -> int:
    """Threads that prepare images while answers are made.

    PyTorch lets go of Python's lock in every operation and must wait to get it back: of several threads that want it
    in between, a small model became slower by a sixth (`bpo bench bootstrap`).
    """
    options = config.bootstrap
    if options.num_workers is not None:
        return options.num_workers
    vision_here = options.vision.engine == "transformers" and set(options.sources) != {"inject"}
    text_here = "inject" in options.sources and not options.inject.server.url and options.inject.engine != "vllm"
    if text_here and not options.inject.llm:
        text_here = options.vision.engine == "transformers"
    return _THREADS_BESIDE_A_MODEL if vision_here or text_here else _THREADS_ALONE


_THREADS_BESIDE_A_MODEL, _THREADS_ALONE = 1, 8
# A batch several times as long as what is in flight keeps a server busy to its end.
_SERVER_BATCHES = 8
# vLLM fills its own batches from what it is given at once.
_VLLM_BATCH = 1024
