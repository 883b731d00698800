"""Quantised weights of the frozen language model (`model.quantization`): QLoRA with nf4 or int8, or products in FP8."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bpo.config.training import Config
from bpo.data.families import Family, family_of
from bpo.model.levers.choice import Lever
from bpo.model.levers.fp8 import MULTIPLE, Fp8Linear
from bpo.model.levers.quantized_layers import NF4_BLOCK, Int8Linear, Nf4Linear, QuantizedLinear, layers_of

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel

_LAYERS: dict[str, type[QuantizedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear, "fp8": Fp8Linear}


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `model.quantization`, as requested; nothing is quantised by itself.

    Raises:
        ValueError: it cannot be used with what is trained, or here.
    """
    value = config.model.quantization
    if value == "none":
        return Lever(value, "weights in model.dtype")
    if config.trainable.language != "lora":
        raise ValueError(
            f"model.quantization is {value}, but trainable.language is {config.trainable.language}: quantised weights "
            "stay frozen; set trainable.language to lora, or model.quantization to none"
        )
    if config.lora.variant == "dora":
        raise ValueError(
            f"lora.variant dora reads the norms of weights, which model.quantization {value} does not store; set "
            "lora.variant to lora or rslora, or model.quantization to none"
        )
    check_available(value, resolved.device, resolved.dtype)
    return Lever(value, "requested")


def check_available(value: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError if weights cannot be quantised to `value` on `device`; says what to change."""
    if value == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("model.quantization nf4 needs bitsandbytes; pip install 'bpo[qlora]', or use int8")
    if value != "fp8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("model.quantization fp8 needs a GPU with FP8 products (compute capability 8.9); use int8")
    if dtype != torch.bfloat16:
        raise ValueError(f"model.quantization fp8 gives products in bfloat16, but model.dtype is {dtype}; set bfloat16")


def check_stage(config: Config, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a quantised model is to be partitioned, given DeepSpeed's settings."""
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if config.model.quantization != "none" and stage == 3:
        raise ValueError(
            f"model.quantization is {config.model.quantization}, but {config.train.ds_config} is ZeRO-3, which "
            "partitions weights before they are quantised; set train.ds_config to ds_configs/zero2.json"
        )


def quantize(model: Any, resolved: ResolvedModel, *, keep_original: bool) -> None:
    """Quantises the linear layers of the loaded language model on the model's device, in place.

    The LM head, embeddings, norms, projector and vision tower keep their weights, and so do fused experts, which are no
    linear layers, and for fp8 layers whose sizes are not multiples of 16.

    Args:
        keep_original: Whether the weights as loaded stay in host memory, see `original_weights`.

    Raises:
        ValueError: weights cannot be quantised here, or a weight is not finite.
    """
    value = resolved.options.quantization
    check_available(value, resolved.device, resolved.dtype)
    language = family_of(model.config).language_module
    for name, layer in model.get_submodule(language).named_modules():
        if type(layer) is not torch.nn.Linear:
            continue
        if value == "fp8" and (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE):
            continue
        try:
            _LAYERS[value].convert(layer, resolved.device, keep_original=keep_original)
        except ValueError as error:
            raise ValueError(
                f"{resolved.options.path}: {language}.{name}.weight: {error}; the files are damaged; use another copy"
            ) from error


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Describes what was quantised when the model was loaded; the layers of PEFT wrap the quantised ones."""
    layers = layers_of(model)
    if lever.value == "none":
        return ""
    assert layers, "the model was loaded without model.quantization"
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    size = sum(weight_bytes(shape, lever.value) for shape in shapes)
    return f"{len(layers)} layers in {size / 2**20:,.0f} MiB"


def weight_bytes(shape: tuple[int, int], value: str) -> float:
    """Bytes of a quantised weight [O, I] with its scales, in bfloat16 where these have model.dtype."""
    numel = shape[0] * shape[1]
    if value == "nf4":  # 4 bits; one byte per block; 4 bytes per 256 blocks
        return numel * (0.5 + (1 + 4 / 256) / NF4_BLOCK)
    return numel + 2 * shape[0]
