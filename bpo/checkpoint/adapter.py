"""Writes trained LoRA weights as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bpo.checkpoint.model_card import hub_id
from bpo.config.adapter import WEIGHTS_FILE
from bpo.config.training import LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import Family, family_of
from bpo.model.adapter import PREFIX, stored_name
from bpo.model.trainable import lora_config


def write_adapter(
    output: Path,
    model: Any,
    state: dict[str, torch.Tensor],
    config: ModelConfig,
    trainable: TrainableConfig,
    lora: LoraConfig,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        model: The base model, for its names; may be without weights.
        config: `model.*` of the base.
        state: Trained parameters by name, as in a checkpoint.

    Raises:
        ValueError: more than LoRA and the modules of the projector was trained.
    """
    if trainable.language != "lora" or trainable.vision != "frozen":
        raise ValueError(
            f"export.form=adapter needs trainable.language=lora and a frozen vision tower; this run had "
            f"language={trainable.language}, vision={trainable.vision}. Use export.form=merged"
        )
    family = family_of(model.config)
    settings = lora_config(model, family, lora, config.path)
    settings.inference_mode = True
    settings.base_model_name_or_path = hub_id(config.path) or config.path
    if trainable.projector == "full":
        if family.projector_parameters:
            raise ValueError(
                f"export.form=adapter cannot hold {', '.join(family.projector_parameters)}, which the projector of "
                f"`{model.config.model_type}` trains in addition to its modules; use export.form=merged"
            )
        settings.modules_to_save = list(_saved_modules(model, family))
    settings.save_pretrained(str(output))
    renamed = {PREFIX + stored_name(name): value for name, value in state.items()}
    save_file(renamed, output / WEIGHTS_FILE, metadata={"format": "pt"})


def _saved_modules(model: torch.nn.Module, family: Family) -> Iterator[str]:
    """Projector names for PEFT, which matches the end of module names and takes members of a list, not the list."""
    for name in family.projector_modules:
        module = model.get_submodule(name)
        members = [f"{name}.{child}" for child, _ in module.named_children()]
        yield from members if isinstance(module, torch.nn.ModuleList) else [name.rsplit(".", 1)[-1]]
