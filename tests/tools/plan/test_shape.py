"""Shapes of models without their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model.load import load_model
from bpo.model.trainable import prepare_trainable
from bpo.tools.plan.shape import model_config_of, shape_of
from bpo.tools.plan.shapes import SHAPES

# Parameters, as the weight files on the hub count them; a tied head is not stored.
PUBLISHED = {
    "llava-1.5-7b": 7_063_427_072,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-72b": 73_410_777_344,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = Config(trainable=TrainableConfig(language="frozen"))
    assert shape_of(name, config).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("language", ["lora", "full"])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_counts_are_those_of_the_model_that_training_prepares(
    family: str, language: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(f"tiny_{family}_dir")
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        trainable=TrainableConfig(language=language),
        lora=LoraConfig(r=4),
    )
    model = load_model(config.model, for_training=True)
    prepare_trainable(model, family_of(model.config), config)
    shape = shape_of(str(directory), config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.by_part()["embeddings"] == model.get_input_embeddings().weight.numel()
    assert shape.trains_head is (language == "full")


def test_a_tied_head_is_counted_once_and_learns_with_the_embeddings() -> None:
    lora, full = (shape_of("qwen2-vl-2b", Config(trainable=TrainableConfig(language=x))) for x in ("lora", "full"))
    assert lora.by_part()["head"] == full.by_part()["head"] == 0
    assert full.trains_head and not lora.trains_head


def test_every_built_in_shape_is_of_a_supported_family() -> None:
    for name in SHAPES:
        assert family_of(model_config_of(name)).language_module


def test_an_unknown_name_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="not a directory or a built-in shape.*llava-1.5-7b"):
        model_config_of("an-owner/llava-9b")
    with pytest.raises(ValueError, match="has no config.json"):
        model_config_of(str(tmp_path))


def test_no_weight_is_made() -> None:
    """A 34 B model in bf16 would be 70 GB."""
    model, _ = shape_of("llava-next-34b", Config(trainable=TrainableConfig(language="frozen"))).build()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert isinstance(model, AutoModelForImageTextToText._model_mapping[type(model.config)])
