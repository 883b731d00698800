"""When a frozen vision tower runs (`vision.encode`): once per image and step, or in each micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.levers.choice import Lever

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel

# Of a vision config: positive values make the tower random in training.
_RANDOM = "attention_dropout dropout hidden_dropout hidden_dropout_prob projection_dropout drop_path_rate".split()


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `vision.encode` for this model and device.

    `step` computes what `micro_batch` does, with another number of rows in its matrix products, as another
    `train.max_micro_batch_tokens` would: the fingerprint of a reference store has neither.

    Raises:
        ValueError: Features of the tower cannot be used twice, but `vision.encode: step` or a cache is requested.
    """
    vision = config.vision
    fault = _why_not(config, resolved.config)
    if vision.encode == "step" or vision.cache != "none":
        option = "encode is step" if vision.encode == "step" else f"cache is {vision.cache}"
        if fault:
            raise ValueError(f"vision.{option}: {fault}, or set vision.encode to micro_batch and vision.cache to none")
        return Lever("step", f"vision.{option}")
    if vision.encode == "micro_batch":
        return Lever("micro_batch", "as configured")
    return Lever("micro_batch", fault or "auto: without a cache, features of an image are seldom used twice")


def _why_not(config: Config, model_config: Any) -> str:
    """Why features of an image may differ from one use to the next; empty if they may not."""
    if config.trainable.vision != "frozen":
        return "the vision tower is trained, so its features change; set trainable.vision to frozen"
    random = [name for name in _RANDOM if (getattr(model_config.vision_config, name, 0.0) or 0.0) > 0]
    if random:
        return f"the vision tower has dropout; set vision_config.{random[0]} to 0 in the model's config.json"
    return ""


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Changes nothing in `model`: `bpo.training.features` runs its tower, `FrozenTower` gives the features back."""
    return ""
