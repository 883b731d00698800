"""LoRA adapter directories as `model.path`: an adapter names its base model, whose processor and config it uses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpo.config.training import ModelConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(path: str) -> bool:
    """Whether a directory has a PEFT adapter and no model."""
    return bool(path) and (Path(path) / CONFIG_FILE).is_file() and not (Path(path) / "config.json").exists()


def base_of(adapter: str) -> str:
    """The model that an adapter names as its base: a directory or Hub id.

    Raises:
        ValueError: It names none, or another adapter.
    """
    file = Path(adapter) / CONFIG_FILE
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not name base_model_name_or_path ({error!r}); add it") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path is {base!r}; set it to the directory of the base model")
    if is_adapter(base):
        raise ValueError(f"{file}: base_model_name_or_path is {base!r}, an adapter itself; merge that one first")
    return base


def split_adapter(options: ModelConfig) -> tuple[ModelConfig, str]:
    """(options of the base model, path of the adapter) if `model.path` is an adapter, else (`options`, "").

    Processor and model config are those of the base.

    Raises:
        ValueError: The adapter does not name its base, or `model.trust_remote_code` is set: the adapter, which may be
            of unknown origin, would choose the code to run.
    """
    if not is_adapter(options.path):
        return options, ""
    base = base_of(options.path)
    if options.trust_remote_code:
        raise ValueError(
            f"model.path {options.path} is an adapter: with model.trust_remote_code, it would choose whose code runs. "
            "Export the merged model, or give the base and the adapter apart"
        )
    return replace(options, path=base), options.path
