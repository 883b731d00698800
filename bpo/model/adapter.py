"""PEFT adapters: put into a loaded model, continued by training, and checked for vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from bpo.config.adapter import CONFIG_FILE, WEIGHTS_FILE, is_adapter
from bpo.config.training import Config

# PEFT's prefix for its two wrappers, in names of weights.
PREFIX = "base_model.model."
# Values that vLLM's --max-lora-rank takes (`MaxLoRARanks` in its vllm/config/lora.py); its default is 16.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16


def with_adapter(model: Any, adapter: str) -> Any:
    """`model` with the layers of a PEFT adapter in it, apart from its own weights, in eval mode.

    Raises:
        ValueError: A file is missing or damaged, or the adapter is of another model.
    """
    import peft

    if not is_adapter(adapter):
        raise ValueError(f"{adapter} has no {CONFIG_FILE}, so it is not a PEFT adapter")
    try:
        adapted = peft.PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"the adapter {adapter} does not fit {model.config.name_or_path}: {reason}") from error
    # The wrapper is not needed: the layers of the adapter are in the model itself.
    return adapted.get_base_model().eval()


def read_settings(adapter: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        ValueError: It is not a JSON object.
    """
    file = Path(adapter) / CONFIG_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); export the adapter again") from error


def check_continued(config: Config, adapter: str) -> None:
    """Compares the options of a training that continues an adapter with those of the adapter; reads no weights.

    Raises:
        ValueError: They differ; names the option with both values.
    """
    stored, lora = read_settings(adapter), config.lora
    projector = "full" if stored.get("modules_to_save") else config.trainable.projector
    options = {
        "trainable.language": ("lora", config.trainable.language),
        "trainable.projector": (projector, config.trainable.projector),
        "lora.r": (stored.get("r"), lora.r),
        "lora.alpha": (stored.get("lora_alpha"), lora.alpha),
        "lora.variant": (_variant(stored), lora.variant),
    }
    for name, (theirs, ours) in options.items():
        if theirs != ours:
            raise ValueError(
                f"model.path {adapter} is an adapter with {name}={theirs}, but {name} is {ours}; training continues "
                f"the adapter, so set {name} to {theirs}, or start from a merged model"
            )
    plain = {"bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}
    if unusual := [f"{name}={stored[name]}" for name in plain if stored.get(name, plain[name]) != plain[name]]:
        raise ValueError(f"the adapter {adapter} has {', '.join(unusual)}, which training cannot continue; merge it")


def _variant(settings: dict[str, Any]) -> str:
    names = [name for name in ("rslora", "dora") if settings.get(f"use_{name}")]
    return " and ".join(names) or "lora"


def stored_name(parameter: str) -> str:
    """PEFT's name of a parameter in an adapter's file, without `PREFIX`."""
    name = parameter.replace(".default.", ".")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


@torch.no_grad()
def load_continued(model: torch.nn.Module, adapter: str) -> None:
    """Puts the weights of an adapter into the LoRA layers and modules that training has prepared, in place.

    Under ZeRO-3, every rank reads the file and keeps its part.

    Raises:
        ValueError: The file is missing or damaged, or the adapter has other layers than the model's.
    """
    file = Path(adapter) / WEIGHTS_FILE
    try:
        stored = {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); export the adapter again") from error
    named = {stored_name(name): parameter for name, parameter in model.named_parameters()}
    wanted = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in named.items() if ".lora_" in n or n in stored}
    found = {name: tuple(value.shape) for name, value in stored.items()}
    if differing := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        raise ValueError(
            f"{adapter} adapts {_layers(found)}, lora.target adapts {_layers(wanted)}; {differing[0]} has the shape "
            f"{found.get(differing[0], 'absent')} in the adapter, {wanted.get(differing[0], 'absent')} here. Set "
            "lora.target to the adapter's layers, or start from a merged model"
        )
    for name, value in stored.items():
        parameter: Any = named[name]
        if hasattr(parameter, "ds_tensor"):  # partitioned by ZeRO-3 while it was loaded
            parameter.all_gather()
            parameter.data.copy_(value)
            parameter.partition(has_been_updated=True)
        else:
            parameter.data.copy_(value)


def _layers(names: Iterable[str]) -> str:
    """Leaf names of adapted layers: `q_proj, v_proj`."""
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if ".lora_" in name}
    return ", ".join(sorted(layers)) or "nothing"


def check_vllm_format(adapter: Path) -> tuple[bool, str]:
    """Whether vLLM's LoRA loader accepts the adapter in a directory, by the checks it documents.

    These are in its vllm/lora/peft_helper.py and vllm/config/lora.py: no modules_to_save, no DoRA, no bias, a rank up
    to the server's --max-lora-rank, and a file of lora_A and lora_B weights only. Whether vLLM supports LoRA for the
    model itself is not checked.

    Returns:
        (accepted, why not with the fix; or the flags to serve it).
    """
    settings = read_settings(str(adapter))
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
    served_rank = vllm_rank(adapter)
    flag = f" --max-lora-rank {served_rank}" if served_rank > _VLLM_DEFAULT_RANK else ""
    return True, f"--enable-lora{flag} --lora-modules NAME=PATH"


def vllm_rank(adapter: Path) -> int:
    """The smallest value of vLLM's max_lora_rank for an adapter that it accepts."""
    rank = read_settings(str(adapter))["r"]
    return next(allowed for allowed in _VLLM_RANKS if allowed >= rank)
