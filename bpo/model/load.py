"""Loads a multimodal model from a directory: for generation, or for training on packed groups."""

from __future__ import annotations

import logging
from typing import Any

import torch

from bpo.config import ModelConfig
from bpo.data.families import family_of
from bpo.model import attention
from bpo.model.recompute import checkpoint_layers

logger = logging.getLogger(__name__)


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype a config names; `config` means the one stored with the model."""
    if config.dtype != "config":
        return getattr(torch, config.dtype)
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code).dtype
    return torch.float32 if stored is None else stored


def load_model(config: ModelConfig, device: torch.device | None = None, *, for_training: bool = False) -> Any:
    """A `*ForConditionalGeneration` model of a supported family.

    With `for_training` the text model gets the shared-prefix attention, unless it cannot share prefixes or
    `model.share_prefix` is never, and the key-value cache is off; the model is left where `from_pretrained` puts it
    (under ZeRO-3 its weights are partitioned as they load).

    Raises:
        ValueError: the model type is not supported, or `model.path` is empty.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not config.path:
        raise ValueError("model.path is empty; give the directory (or hub id) of the model")
    model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    family = family_of(model_config, config.share_prefix)  # refuses an unsupported type before any weight is read
    shares_prefix = for_training and family.separate_reason is None
    text_attention = attention.register() if shares_prefix else _own_attention(model_config.get_text_config())
    model = AutoModelForImageTextToText.from_pretrained(
        config.path,
        config=model_config,
        dtype=resolve_dtype(config),
        attn_implementation={"text_config": text_attention, "vision_config": config.vision_attention},
        trust_remote_code=config.trust_remote_code,
    )
    if for_training:
        model.config.use_cache = False
        checkpoint_layers(model, str(config.gradient_checkpointing))
        return model
    return model.to(device or torch.device("cpu")).eval()


def _own_attention(text_config: Any) -> str:
    """transformers' implementation for ordinary sequences; its SDPA leaves out a cap on attention scores."""
    return "eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa"
