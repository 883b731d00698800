"""Loads a multimodal model from a directory: for generation, or for training on packed groups."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from bpo.config.training import ModelConfig
from bpo.data.families import family_of
from bpo.model.attention import shared_prefix
from bpo.model.attention.choice import Choice, Needs, choose_backend
from bpo.model.recompute import checkpoint_layers


@dataclass(frozen=True)
class ResolvedModel:
    """The options of a model and what its stored config makes of them; resolved once per start.

    options: `model.*`.
    config: The model's own config, as transformers reads it.
    device: Where it computes.
    dtype: Of weights and activations.
    for_training: Whether it trains on packed groups; otherwise it generates.
    attention: How packed groups attend; None for a model that trains on separate sequences, or generates.
    """

    options: ModelConfig
    config: Any
    device: torch.device
    dtype: torch.dtype
    for_training: bool
    attention: Choice | None


def resolve_model(
    options: ModelConfig, device: torch.device | None = None, *, for_training: bool = False
) -> ResolvedModel:
    """Reads the model's config and settles dtype and attention; loads no weights.

    Args:
        device: Where the model will compute; the CPU unless given.

    Raises:
        ValueError: `model.path` is empty, the model type is not supported, or `model.attention` cannot run on `device`.
    """
    from transformers import AutoConfig

    if not options.path:
        raise ValueError("model.path is empty; give the directory (or hub id) of the model")
    config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    shares_prefix = family_of(config, options.share_prefix).separate_reason is None
    device = device or torch.device("cpu")
    dtype = (config.dtype or torch.float32) if options.dtype == "config" else getattr(torch, options.dtype)
    attention = None
    if for_training and shares_prefix:
        attention = choose_backend(options.attention, Needs.of_model(config.get_text_config(), device, dtype))
    return ResolvedModel(options, config, device, dtype, for_training, attention)


def load_model(options: ModelConfig, device: torch.device | None = None, *, for_training: bool = False) -> Any:
    """`load_resolved(resolve_model(...))`: a `*ForConditionalGeneration` model of a supported family."""
    return load_resolved(resolve_model(options, device, for_training=for_training))


def load_resolved(model: ResolvedModel) -> Any:
    """Loads the weights.

    For training the text model gets the shared-prefix attention, unless it cannot share prefixes or
    `model.share_prefix` is never, and the key-value cache is off; the model is left where `from_pretrained` puts it
    (under ZeRO-3 its weights are partitioned as they load). For generation it is moved to its device.
    """
    from transformers import AutoModelForImageTextToText

    options = model.options
    attentions = {"vision_config": options.vision_attention}
    if model.attention is not None:  # else transformers' own choice: SDPA where the text model has it
        attentions["text_config"] = shared_prefix.register(model.attention)
    elif getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        attentions["text_config"] = "eager"  # SDPA has no cap on scores, and some versions choose it nevertheless
    loaded = AutoModelForImageTextToText.from_pretrained(
        options.path,
        config=copy.deepcopy(model.config),  # it is changed, and `model.config` describes what is stored
        dtype=model.dtype,
        attn_implementation=attentions,
        trust_remote_code=options.trust_remote_code,
    )
    if model.for_training:
        loaded.config.use_cache = False
        checkpoint_layers(loaded, str(options.gradient_checkpointing))
        return loaded
    return loaded.to(model.device).eval()
