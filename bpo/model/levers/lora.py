"""Adapted linear layers by the kernels of `bpo_kernels` (`lora.kernel`), and the seed of their dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.levers.choice import Lever
from bpo_kernels.lora_operator import MAX_RANK

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel

# The operation computes what PEFT does, but its tests have not passed on a GPU yet; then `addmm` on CUDA.
_UNTESTED = "auto: only on request, as its tests have not passed on a GPU yet"


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `lora.kernel` for this model and device.

    Raises:
        ValueError: `fused` or `addmm` is requested, and PEFT's layers compute something else.
    """
    lora, requested = config.lora, config.lora.kernel
    if requested == "peft":
        return Lever("peft", "requested")
    if config.trainable.language != "lora":
        return Lever("peft", f"trainable.language is {config.trainable.language}: no layer is adapted")
    obstacle = ""
    if lora.variant == "dora":
        obstacle = "lora.variant is dora, which rescales the base's output: set lora.variant to lora or rslora"
    elif lora.r > MAX_RANK:
        obstacle = f"lora.r is {lora.r}: set it to at most {MAX_RANK}"
    elif config.model.quantization != "none":
        obstacle = f"model.quantization is {config.model.quantization}: set it to none"
    if requested != "auto":
        if obstacle:
            raise ValueError(f"lora.kernel is {requested}, but {obstacle}, or lora.kernel to auto")
        return Lever(requested, "requested")
    return Lever("peft", obstacle.split(":")[0] or _UNTESTED)


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Installs the selected value in `model`; returns what was changed, for the log."""
    if lever.value == "peft":
        return ""
    from bpo.model.levers.lora_layers import group_layers

    return group_layers(model.get_submodule(family.language_module), lever.value)


# A global, not a context variable: CUDA's backward pass runs in its own thread, where gradient checkpointing calls the
# layers again.
_seeds: list[torch.Tensor] = []


@contextlib.contextmanager
def adapter_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Determines the dropout masks of the adapted layers; must enclose forward *and* backward of a micro-batch.

    The mask of a layer depends on the seed, the layer and the position of the element in its input alone, so that the
    backward pass and gradient checkpointing draw it again. PEFT's own layers draw theirs from PyTorch's generator.

    Args:
        seed: Below 2^63; differs between steps, micro-batches and ranks.
    """
    # Filled by a kernel: copying a number to the device would wait for all work before it.
    _seeds.append(torch.full((1,), seed, dtype=torch.int64, device=device))
    try:
        yield
    finally:
        _seeds.pop()


def dropout_seed() -> torch.Tensor:
    """The seed [1] of the innermost `adapter_dropout`.

    Raises:
        RuntimeError: There is none. A default would repeat the masks of another micro-batch.
    """
    if not _seeds:
        raise RuntimeError(
            "lora.dropout with lora.kernel fused or addmm needs a seed: enclose forward and backward in "
            "adapter_dropout(seed, device), call model.eval(), or set lora.kernel to peft"
        )
    return _seeds[-1]


def borrowed_parameters(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Parameter]]:
    """Modules with each parameter of other modules that their forward pass reads, which ZeRO-3 must gather for them."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "borrowed_parameters"):
            yield from ((module, parameter) for parameter in module.borrowed_parameters())
        for dora in getattr(module, "lora_magnitude_vector", {}).values():  # reads the weights of the whole layer
            yield from ((dora, parameter) for parameter in module.parameters() if parameter is not dora.weight)
