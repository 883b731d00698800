"""Trainable parameters (LoRA or full language model, projector, vision tower) and the optimizer's parameter groups."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from bpo.config.adapter import split_adapter
from bpo.config.training import Config, LoraConfig, TrainableConfig
from bpo.data.families import Family
from bpo.model.adapter import check_continued, load_continued

logger = logging.getLogger(__name__)


def lora_target_names(model: torch.nn.Module, family: Family, config: LoraConfig) -> list[str]:
    """Leaf names of the linear layers that get an adapter: `lora.target`, or all of the language model.

    Raises:
        ValueError: a name of `lora.target` is not a linear layer of the language model; lists the valid names.
    """
    language = model.get_submodule(family.language_module)
    linears = {name.rsplit(".", 1)[-1] for name, m in language.named_modules() if isinstance(m, torch.nn.Linear)}
    unknown = sorted(set(config.target) - linears)
    if unknown:
        raise ValueError(
            f"lora.target names {', '.join(unknown)}; the language model's linear layers are "
            f"{', '.join(sorted(linears))} (an adapter on the LM head is not supported)"
        )
    return sorted(config.target or linears)


def lora_config(model: torch.nn.Module, family: Family, config: LoraConfig, path: str) -> Any:
    """The PEFT configuration whose pattern matches only layers inside the language model."""
    import peft

    names = "|".join(map(re.escape, lora_target_names(model, family, config)))
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=rf".*{re.escape(family.language_module)}\..*\.({names})",
        base_model_name_or_path=path,
    )


def prepare_trainable(model: torch.nn.Module, family: Family, config: Config) -> None:
    """Freezes and adapts `model` in place, per `trainable.*` and `lora.*`.

    LoRA's B is initialized to zero, so the policy before its first step equals the reference. If `model.path` is an
    adapter, `model` is its base, and the adapter's weights, which training continues, are put in.

    Raises:
        ValueError: Nothing is trainable, or the adapter cannot be continued with these options.
    """
    chosen: TrainableConfig = config.trainable
    base, adapter = split_adapter(config.model)
    if adapter:
        check_continued(config, adapter)
    model.requires_grad_(False)
    if chosen.vision == "full":
        model.get_submodule(family.vision_module).requires_grad_(True)
    for name in family.projector_modules:
        model.get_submodule(name).requires_grad_(chosen.projector == "full")
    for name in family.projector_parameters:
        model.get_parameter(name).requires_grad_(chosen.projector == "full")
    if chosen.language == "full":
        model.get_submodule(family.language_module).requires_grad_(True)
        learn_head = chosen.lm_head == "full"
        model.get_submodule(family.language_module).get_input_embeddings().requires_grad_(learn_head)  # type: ignore[operator]
        model.lm_head.requires_grad_(learn_head)  # type: ignore[union-attr, operator]
    if chosen.language == "lora":
        _inject_lora(model, family, config, base.path)
    if adapter:
        load_continued(model, adapter)
    trainable = sum(_numel(p) for p in model.parameters() if p.requires_grad)
    total = sum(_numel(p) for p in model.parameters())
    logger.info("trainable parameters: %s of %s (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total)
    if trainable == 0:
        raise ValueError("nothing is trainable; see trainable.* in the configuration")


def _inject_lora(model: torch.nn.Module, family: Family, config: Config, path: str) -> None:
    import peft

    wants_grad = {name for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(config.train.seed)  # the same adapter on every rank and in every run
    with _partitions_known_to_peft(model):
        peft.inject_adapter_in_model(lora_config(model, family, config.lora, path), model)
    for name, parameter in model.named_parameters():
        # PEFT freezes everything except the adapter; restore what was trainable. PEFT creates adapters in fp32, but
        # ZeRO partitions parameters of one dtype.
        if "lora_" in name:
            parameter.data = parameter.data.to(_language_dtype(model))
        elif name.replace(".base_layer", "") in wants_grad:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _partitions_known_to_peft(model: torch.nn.Module) -> Iterator[None]:
    """Under ZeRO-3, lets PEFT gather each weight whose norms it needs for DoRA, as it does if transformers says so."""
    if not any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    handle = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del handle


def _language_dtype(model: Any) -> torch.dtype:
    return model.lm_head.weight.dtype


def _numel(parameter: torch.nn.Parameter) -> int:
    if hasattr(parameter, "unpacked_shape"):  # quantised
        return math.prod(parameter.unpacked_shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_groups(model: torch.nn.Module, family: Family, config: Config) -> list[dict[str, Any]]:
    """Optimizer groups: the projector with its own learning rate, weight decay on matrices only."""
    projector_lr = config.train.projector_lr or config.train.lr
    projector = (*family.projector_modules, *family.projector_parameters)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_projector = any(f"{module}." in f"{name}." for module in projector)
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))
        key = (projector_lr if is_projector else config.train.lr, config.train.weight_decay if ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
