"""Loads a multimodal model from a directory: for generation, or for training on packed groups."""

from __future__ import annotations

import contextlib
import copy
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bpo.config.adapter import split_adapter
from bpo.config.training import ModelConfig, missing_model
from bpo.data.families import family_of
from bpo.model.adapter import with_adapter
from bpo.model.attention import shared_prefix
from bpo.model.attention.choice import Choice, Needs, choose_backend
from bpo.model.levers.quantized import quantize
from bpo.model.recompute import checkpoint_layers
from bpo.model.reference.fingerprint import weight_files


@dataclass(frozen=True)
class ResolvedModel:
    """The options of a model, resolved against its stored config once per start.

    options: `model.*`; `path` is that of the base, if `model.path` is an adapter.
    config: The model's own config, as read by transformers.
    device: Device of the computation.
    dtype: Of weights and activations.
    for_training: Whether the model trains on packed groups; otherwise it generates.
    attention: Backend for packed groups; None for training on separate sequences and for generation.
    adapter: Directory of the adapter, if `model.path` is one; else empty.
    """

    options: ModelConfig
    config: Any
    device: torch.device
    dtype: torch.dtype
    for_training: bool
    attention: Choice | None
    adapter: str = ""


def resolve_model(
    options: ModelConfig, device: torch.device | None = None, *, for_training: bool = False
) -> ResolvedModel:
    """Reads the model's config (an adapter's is that of its base), resolves dtype and attention; loads no weights.

    Args:
        device: Device of the computation; defaults to the CPU.

    Raises:
        ValueError: `model.path` is empty, the model type is not supported, or `model.attention` cannot run on `device`;
            see also `split_adapter`.
    """
    from transformers import AutoConfig

    if not options.path:
        raise ValueError("model.path is empty; set it to the directory (or hub id) of the model")
    options, adapter = split_adapter(options)
    with named_model_errors(options.path):
        config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    shares_prefix = family_of(config, options.share_prefix).separate_reason is None
    device = device or torch.device("cpu")
    dtype = (config.dtype or torch.float32) if options.dtype == "config" else getattr(torch, options.dtype)
    attention = None
    if for_training and shares_prefix:
        attention = choose_backend(options.attention, Needs.of_model(config.get_text_config(), device, dtype))
    return ResolvedModel(options, config, device, dtype, for_training, attention, adapter)


@contextlib.contextmanager
def named_model_errors(path: str) -> Iterator[None]:
    """Turns the libraries' errors about files of the model into one line that says what is missing or damaged.

    Raises:
        ValueError: an error was raised, and a file is missing or damaged, or the libraries found no model.
    """
    try:
        yield
    except Exception as error:  # for a missing file: OSError, KeyError, ValueError, SafetensorError
        fault = _fault_of_files(path)
        if not fault and isinstance(error, ValueError) and "trust_remote_code" in str(error):
            fault = "the model brings its own code; read it, and if you trust it, set model.trust_remote_code to true"
        if not fault and not (isinstance(error, OSError) and error.errno in (None, errno.ENOENT)):
            raise
        raise ValueError(f"model.path is {path!r}: {fault or ' '.join(str(error).split())}") from error


def _fault_of_files(path: str) -> str:
    """What a model directory lacks, or which of its weight files is damaged; empty if neither is known."""
    from safetensors import SafetensorError, safe_open

    directory = Path(path)
    if fault := missing_model(path):
        return fault
    if not directory.is_dir():
        return "no such directory, and no such model in the Hub's cache or, if this machine is online, on the Hub"
    files = weight_files(directory)
    if not files:
        return "the directory has no weights (model.safetensors, or its index with all shards)"
    if missing := [file.name for file in files if not file.is_file()]:
        return f"weight files are missing: {', '.join(missing)}; copy the model again"
    for file in files:
        if file.suffix == ".safetensors":
            try:
                safe_open(file, "pt").__enter__()
            except SafetensorError as error:
                return f"{file.name} is damaged or cut off ({error}); copy the model again"
    return ""


def load_model(options: ModelConfig, device: torch.device | None = None, *, for_training: bool = False) -> Any:
    """`load_resolved(resolve_model(...))`: a `*ForConditionalGeneration` model of a supported family."""
    return load_resolved(resolve_model(options, device, for_training=for_training))


def load_resolved(model: ResolvedModel) -> Any:
    """Loads the weights, with those of the adapter, if there is one; see `load_base`."""
    loaded = load_base(model)
    return with_adapter(loaded, model.adapter) if model.adapter else loaded


def load_base(model: ResolvedModel, *, keep_original: bool = False) -> Any:
    """Loads the weights, without those of an adapter, which training continues: see `prepare_trainable`.

    For training, the text model uses the shared-prefix attention, unless it cannot share prefixes or
    `model.share_prefix` is never, and the KV cache is disabled; the weights stay where `from_pretrained` loads them
    (under ZeRO-3 they are partitioned during loading), except for quantised ones, which are made on the model's device.
    For generation, the model is moved to its device.

    Args:
        keep_original: Whether the weights before quantisation stay in host memory, see `report_quantization_gap`.
    """
    from transformers import AutoModelForImageTextToText

    options = model.options
    attentions = {"vision_config": options.vision_attention}
    if model.attention is not None:  # else transformers' own choice: SDPA where the text model has it
        attentions["text_config"] = shared_prefix.register(model.attention)
    elif getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        attentions["text_config"] = "eager"  # SDPA does not support softcapping, but some versions select it anyway
    with named_model_errors(options.path):
        loaded = AutoModelForImageTextToText.from_pretrained(
            options.path,
            config=copy.deepcopy(
                model.config
            ),  # from_pretrained modifies it; `model.config` describes the stored model
            dtype=model.dtype,
            attn_implementation=attentions,
            trust_remote_code=options.trust_remote_code,
        )
    if options.quantization != "none":
        quantize(loaded, model, keep_original=keep_original)
    if model.for_training:
        loaded.config.use_cache = False
        checkpoint_layers(loaded, str(options.gradient_checkpointing))
        return loaded
    return loaded.to(model.device).eval()
