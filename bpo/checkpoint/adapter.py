"""Writes trained LoRA weights as a PEFT adapter, and says whether vLLM can serve it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bpo.checkpoint.model_card import hub_id
from bpo.config.training import LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import Family, family_of
from bpo.model.trainable import lora_config

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# Values that vLLM's --max-lora-rank takes (`MaxLoRARanks` in its vllm/config/lora.py); its default is 16.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16


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
    # PEFT's names: no adapter name, and a prefix for its two wrappers.
    renamed = {f"base_model.model.{name.replace('.default.', '.')}": value for name, value in state.items()}
    save_file(renamed, output / WEIGHTS_FILE, metadata={"format": "pt"})


def _saved_modules(model: torch.nn.Module, family: Family) -> Iterator[str]:
    """Projector names for PEFT, which matches the end of module names and takes members of a list, not the list."""
    for name in family.projector_modules:
        module = model.get_submodule(name)
        members = [f"{name}.{child}" for child, _ in module.named_children()]
        yield from members if isinstance(module, torch.nn.ModuleList) else [name.rsplit(".", 1)[-1]]


def check_vllm_format(adapter: Path) -> tuple[bool, str]:
    """Whether vLLM's LoRA loader accepts the adapter in a directory, by the checks it documents.

    These are in its vllm/lora/peft_helper.py and vllm/config/lora.py: no modules_to_save, no DoRA, no bias, a rank up
    to the server's --max-lora-rank, and a file of lora_A and lora_B weights only. Whether vLLM supports LoRA for the
    model itself is not checked.

    Returns:
        (accepted, why not with the fix; or the flags to serve it).
    """
    settings = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    with safe_open(str(adapter / WEIGHTS_FILE), framework="pt") as tensors:
        names = list(tensors.keys())
    rank, problems = settings["r"], []
    if saved := settings.get("modules_to_save"):
        problems.append(f"it contains the trained projector ({', '.join(saved)}, modules_to_save)")
    elif other := [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        problems.append(f"it contains weights other than lora_A and lora_B, such as {other[0]}")
    if settings.get("use_dora"):
        problems.append("it uses DoRA")
    if settings.get("bias", "none") != "none":
        problems.append(f"it has biases (bias={settings['bias']})")
    if rank > _VLLM_RANKS[-1]:
        problems.append(f"its rank {rank} is above {_VLLM_RANKS[-1]}, the largest --max-lora-rank")
    if problems:
        return False, f"{'; '.join(problems)}; serve the merged form (--export.form merged)"
    served_rank = next(allowed for allowed in _VLLM_RANKS if allowed >= rank)
    flag = f" --max-lora-rank {served_rank}" if served_rank > _VLLM_DEFAULT_RANK else ""
    return True, f"--enable-lora{flag} --lora-modules NAME=PATH"
