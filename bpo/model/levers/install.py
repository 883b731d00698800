"""Resolves the options of all levers once, and installs the selected ones in a model that is ready for training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.levers import compiled, layer_kernels, lora, patch_embedding, quantized, vision
from bpo.model.levers.choice import Lever

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel

logger = logging.getLogger(__name__)

# By option, in the order of installation.
_MODULES: dict[str, Any] = {
    "model.quantization": quantized,
    "model.patch_embedding": patch_embedding,
    "model.layer_kernels": layer_kernels,
    "lora.kernel": lora,
    "model.compile": compiled,
    "vision.encode": vision,
}
# Values that leave the computation to transformers, PEFT and PyTorch.
_PLAIN = ("none", "conv", "peft", "micro_batch", "step")


def choose_levers(config: Config, resolved: ResolvedModel) -> dict[str, Lever]:
    """The selected value of each lever's option, by the option's name; loads nothing.

    Raises:
        ValueError: A requested value cannot be used here; gives the reason and the fix.
    """
    return {name: module.choose(config, resolved) for name, module in _MODULES.items()}


def rounding_facts(levers: dict[str, Lever]) -> dict[str, str]:
    """What differs from the plain computation, for the reference store: policy and reference must round alike."""
    return {name: lever.value for name, lever in levers.items() if lever.value not in _PLAIN}


def install_levers(model: Any, family: Family, config: Config, levers: dict[str, Lever]) -> None:
    """Installs the selected levers in `model`, in place, after `prepare_trainable` and before DeepSpeed.

    No class of transformers or PEFT is changed, only this model's modules. Logs one line per lever.
    """
    for name, module in _MODULES.items():
        what = module.install(model, family, config, levers[name])
        logger.info("%s: %s (%s)%s", name, levers[name].value, levers[name].reason, f": {what}" if what else "")
