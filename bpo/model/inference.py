"""Loads a model for inference: a model directory, such as a merged export, alone or with a PEFT adapter."""

from __future__ import annotations

from typing import Any

import torch

from bpo.config.adapter import is_adapter
from bpo.config.training import ModelConfig
from bpo.model.adapter import with_adapter
from bpo.model.load import load_model


def load_for_inference(options: ModelConfig, adapter: str = "", device: torch.device | None = None) -> Any:
    """A `*ForConditionalGeneration` model of a supported family on `device`, in eval mode.

    LoRA weights stay apart from the base's: in half precision, adding them would round most of the change away.

    Args:
        options: `model.*`; `path` is a model or, without `adapter`, a PEFT adapter that names its base.
        adapter: Directory of a PEFT adapter for the model.

    Raises:
        ValueError: A file is missing or damaged, or the adapter is of another model.
    """
    if adapter and is_adapter(options.path):
        raise ValueError(
            f"model.path {options.path} is an adapter itself; give the base model with the adapter {adapter}"
        )
    model = load_model(options, device)
    return with_adapter(model, adapter) if adapter else model
