"""Model shapes without weights: built on the meta device, with the adapters and frozen parts of the run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bpo.config.training import Config
from bpo.data.families import Family, family_of
from bpo.model.trainable import prepare_trainable
from bpo.tools.plan.shapes import SHAPES
from bpo.training.flops import ModelFlops, model_flops, part_of

PARTS = ("vision", "projector", "embeddings", "language", "head")
Build = Callable[[], tuple[Any, Family]]


@dataclass(frozen=True)
class Tensor:
    """One parameter: its part of the model (one of PARTS), number of elements, whether it is trained."""

    part: str
    numel: int
    trained: bool


@dataclass(frozen=True)
class ModelShape:
    """The properties that memory and speed depend on; a tied head counts as `embeddings`.

    Attributes:
        name: The requested model.
        config: The transformers config.
        tensors: All parameters, in module order.
        flops: Matrix products by part.
        build: Creates a new meta model.
    """

    name: str
    config: Any
    tensors: tuple[Tensor, ...]
    flops: ModelFlops
    build: Build

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @functools.cached_property
    def num_parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @functools.cached_property
    def num_trained(self) -> int:
        return sum(tensor.numel for tensor in self.tensors if tensor.trained)

    def by_part(self, *, trained: bool = False) -> dict[str, int]:
        """Number of elements by part; with `trained`, of trained parameters only."""
        return {
            part: sum(t.numel for t in self.tensors if t.part == part and (t.trained or not trained)) for part in PARTS
        }

    @functools.cached_property
    def meta_model(self) -> tuple[Any, Family]:
        """The model on the meta device, for tracing; each trace changes its attention and recomputation settings."""
        return self.build()

    @property
    def trains_head(self) -> bool:
        part = "head" if any(tensor.part == "head" for tensor in self.tensors) else "embeddings"  # tied
        return any(tensor.trained for tensor in self.tensors if tensor.part == part)


def model_config_of(name: str) -> Any:
    """The transformers config of a built-in name, a directory with a config.json, or a hub id.

    Raises:
        ValueError: The name is none of these, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    if name in SHAPES:
        arguments = copy.deepcopy(SHAPES[name])
        return AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name}: the directory has no config.json; give a model directory")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--model {name}: not a directory or a built-in shape ({', '.join(sorted(SHAPES))}), and its config cannot "
            f"be read from the hub: {reason}"
        ) from error


def shape_of(name: str, config: Config, model_config: Any | None = None) -> ModelShape:
    """The shape of a model as `config.trainable` and `config.lora` train it.

    Args:
        name: See `model_config_of`.
        config: Configuration of the run; `model.path` is not used.
        model_config: Used instead of the config of `name`.

    Raises:
        ValueError: The name is unknown, the family is not supported, or no parameter is trained.
    """
    given = model_config_of(name) if model_config is None else model_config
    build = functools.partial(_meta_model, given, config)
    model, family = build()
    embeddings = model.get_input_embeddings().weight
    tensors = []
    for parameter_name, parameter in model.named_parameters():
        part = part_of(parameter_name, family)
        if parameter is embeddings:
            part = "embeddings"
        elif part == "other":
            part = "vision"
        tensors.append(Tensor(part, parameter.numel(), parameter.requires_grad))
    return ModelShape(name, model.config, tuple(tensors), model_flops(model, family), build)


def _meta_model(model_config: Any, config: Config) -> tuple[Any, Family]:
    from transformers import AutoModelForImageTextToText

    own = copy.deepcopy(model_config)
    own.use_cache = False
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            own, dtype=torch.float32 if config.model.dtype == "float32" else torch.bfloat16
        )
        family = family_of(model.config, config.model.share_prefix)
        prepare_trainable(model, family, config)
    return model, family
