"""When a frozen tower runs: what is selected, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.config.training import Config, ModelConfig, TrainableConfig
from bpo.config.vision import VisionConfig
from bpo.model.levers.install import choose_levers, rounding_facts
from bpo.model.levers.vision import choose
from bpo.model.load import resolve_model


def chosen(
    directory: Path, device: str = "cpu", vision: Any = None, trained: str = "frozen", dropout: float = 0
) -> str:
    """The selected value; `vision`: options of `vision.*`."""
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        vision=VisionConfig(**(vision or {})),
        trainable=TrainableConfig(vision=trained),  # type: ignore[arg-type]
    )
    resolved = resolve_model(config.model, for_training=True)
    resolved.config.vision_config.attention_dropout = dropout
    lever = choose(config, SimpleNamespace(config=resolved.config, device=torch.device(device)))  # type: ignore[arg-type]
    assert lever.reason
    return lever.value


def test_what_is_selected(tiny_llava_dir: Path) -> None:
    assert chosen(tiny_llava_dir) == "micro_batch"
    assert chosen(tiny_llava_dir, "cuda") == "micro_batch"
    assert chosen(tiny_llava_dir, "cuda", {"cache": "memory"}) == "step"
    assert chosen(tiny_llava_dir, "cuda", {"encode": "micro_batch"}) == "micro_batch"
    assert chosen(tiny_llava_dir, vision={"encode": "step"}) == "step"
    assert chosen(tiny_llava_dir, vision={"cache": "disk"}) == "step"
    assert chosen(tiny_llava_dir, "cuda", trained="full") == "micro_batch"
    assert chosen(tiny_llava_dir, "cuda", dropout=0.1) == "micro_batch"


@pytest.mark.parametrize("vision", [{"encode": "step"}, {"cache": "memory"}])
def test_what_cannot_be_is_an_error(tiny_llava_dir: Path, vision: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="set trainable.vision to frozen, or set vision.encode to micro_batch"):
        chosen(tiny_llava_dir, vision=vision, trained="full")
    with pytest.raises(ValueError, match="set vision_config.attention_dropout to 0"):
        chosen(tiny_llava_dir, vision=vision, dropout=0.1)


def test_a_cache_needs_the_images_of_a_step() -> None:
    with pytest.raises(ValueError, match="set vision.encode to step or auto"):
        VisionConfig(encode="micro_batch", cache="disk")


def test_a_reference_store_does_not_depend_on_it(tiny_llava_dir: Path) -> None:
    """It may be filled and read in batches of any size."""
    facts = []
    for encode in ("micro_batch", "step"):
        config = Config(model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"))
        config.vision = VisionConfig(encode=encode)  # type: ignore[arg-type]
        facts.append(rounding_facts(choose_levers(config, resolve_model(config.model, for_training=True))))
    assert facts[0] == facts[1]
