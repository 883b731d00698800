"""Loads a model for inference: a model directory, such as a merged export, alone or with a PEFT adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bpo.config.training import ModelConfig
from bpo.model.load import load_model

_ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: str) -> bool:
    """Whether a directory has a PEFT adapter and no model."""
    return (Path(path) / _ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").exists()


def split_adapter(options: ModelConfig) -> tuple[ModelConfig, str]:
    """(options of the base model, path of the adapter) if `model.path` is an adapter, else (`options`, "").

    Processor and model config are those of the base.

    Raises:
        ValueError: The adapter does not name its base, or `model.trust_remote_code` is set: the adapter, which may be
            of unknown origin, would choose the code to run.
    """
    if not is_adapter(options.path):
        return options, ""
    file = Path(options.path) / _ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not name base_model_name_or_path ({error!r}); add it") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path is {base!r}; set it to the directory of the base model")
    if options.trust_remote_code:
        raise ValueError(
            f"model.path {options.path} is an adapter: with model.trust_remote_code, it would choose whose code runs. "
            "Export the merged model, or give the base and the adapter apart"
        )
    return replace(options, path=base), options.path


def load_for_inference(options: ModelConfig, adapter: str = "", device: torch.device | None = None) -> Any:
    """A `*ForConditionalGeneration` model of a supported family on `device`, in eval mode.

    LoRA weights stay apart from the base's: in half precision, adding them would round most of the change away.

    Args:
        options: `model.*`; `path` is a model or, without `adapter`, a PEFT adapter that names its base.
        adapter: Directory of a PEFT adapter for the model.

    Raises:
        ValueError: A file is missing or damaged, or the adapter is of another model.
    """
    base, own = split_adapter(options)
    if adapter and own:
        raise ValueError(f"model.path {own} is an adapter itself; give the base model with the adapter {adapter}")
    model = load_model(base, device)
    return _with_adapter(model, adapter or own) if adapter or own else model


def _with_adapter(model: Any, adapter: str) -> Any:
    import peft

    if not is_adapter(adapter):
        raise ValueError(f"{adapter} has no {_ADAPTER_CONFIG}, so it is not a PEFT adapter")
    try:
        adapted = peft.PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"the adapter {adapter} does not fit {model.config.name_or_path}: {reason}") from error
    # The wrapper is not needed: the layers of the adapter are in the model itself.
    return adapted.get_base_model().eval()
