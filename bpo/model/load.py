"""Loads a multimodal model from a directory: for generation, or for training on packed groups."""

from __future__ import annotations

import logging
from typing import Any

import torch

from bpo.config.training import ModelConfig
from bpo.data.families import family_of
from bpo.model.attention import shared_prefix
from bpo.model.attention.choice import Choice, Needs, choose_backend
from bpo.model.recompute import checkpoint_layers

logger = logging.getLogger(__name__)


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype a config names; `config` means the one stored with the model."""
    if config.dtype != "config":
        return getattr(torch, config.dtype)
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code).dtype
    return torch.float32 if stored is None else stored


def choose_attention(config: ModelConfig, device: torch.device) -> Choice | None:
    """How packed groups attend on `device`, or None for a model that trains on separate sequences.

    Raises:
        ValueError: `model.attention` asks for what cannot run there.
    """
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    if family_of(model_config, config.share_prefix).separate_reason is not None:
        return None
    needs = Needs.of_model(model_config.get_text_config(), device, resolve_dtype(config))
    return choose_backend(config.attention, needs)


def load_model(config: ModelConfig, device: torch.device | None = None, *, for_training: bool = False) -> Any:
    """A `*ForConditionalGeneration` model of a supported family.

    With `for_training` the text model gets the shared-prefix attention, unless it cannot share prefixes or
    `model.share_prefix` is never, and the key-value cache is off; the model is left where `from_pretrained` puts it
    (under ZeRO-3 its weights are partitioned as they load).

    Args:
        config: Which model, and how it is held.
        device: Where it will compute; the CPU unless given. Only a model for generation is put there.
        for_training: See above.

    Raises:
        ValueError: the model type is not supported, `model.path` is empty, or `model.attention` cannot run on `device`.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not config.path:
        raise ValueError("model.path is empty; give the directory (or hub id) of the model")
    model_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    family_of(model_config, config.share_prefix)  # refuses an unsupported type before any weight is read
    device = device or torch.device("cpu")
    choice = choose_attention(config, device) if for_training else None
    attentions = {"vision_config": config.vision_attention}
    if choice is not None:  # else transformers' own choice: SDPA where the text model has it
        attentions["text_config"] = shared_prefix.register(choice)
    elif getattr(model_config.get_text_config(), "attn_logit_softcapping", None):
        attentions["text_config"] = "eager"  # SDPA has no cap on scores, and in some versions is chosen all the same
    model = AutoModelForImageTextToText.from_pretrained(
        config.path,
        config=model_config,
        dtype=resolve_dtype(config),
        attn_implementation=attentions,
        trust_remote_code=config.trust_remote_code,
    )
    if for_training:
        model.config.use_cache = False
        checkpoint_layers(model, str(config.gradient_checkpointing))
        return model
    return model.to(device).eval()
