"""Model family specifics: image tokens, positions and module names.

The family is selected by `model_type`. To add one, write a subclass and register it in `FAMILIES` (docs/models.md).
"""

from __future__ import annotations

from typing import Any

from bpo.data.families.base import Family, ImagePlace
from bpo.data.families.gemma import Gemma3
from bpo.data.families.idefics import Idefics3
from bpo.data.families.internvl import InternVL
from bpo.data.families.llava import Llava, LlavaNext, LlavaOnevision
from bpo.data.families.qwen import Qwen2VL, Qwen3VL

__all__ = ["FAMILIES", "Family", "ImagePlace", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    "gemma3": Gemma3,
    "idefics3": Idefics3,
    "internvl": InternVL,
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "qwen2_5_vl": Qwen2VL,
    "qwen2_vl": Qwen2VL,
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VL,
    "smolvlm": Idefics3,
}


def family_of(config: Any, share_prefix: str = "auto") -> Family:
    """Returns the family of a transformers model config.

    Args:
        config: Config of the whole model.
        share_prefix: Value of `model.share_prefix`; "never" trains on separate sequences even if sharing is possible.

    Raises:
        ValueError: The model type is not supported; lists the supported ones.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model type `{config.model_type}` is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type](config, share_prefix)
