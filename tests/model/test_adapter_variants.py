"""rsLoRA and DoRA: from the policy before its first step to both forms of export, and to a run that continues it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bpo.checkpoint.adapter import write_adapter
from bpo.checkpoint.merge import merge_into
from bpo.config.adapter import CONFIG_FILE, WEIGHTS_FILE
from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model.adapter import with_adapter
from bpo.model.load import load_base, load_model, resolve_model
from bpo.model.trainable import prepare_trainable
from bpo.tools.plan.shape import shape_of
from tests.trained_checkpoint import perturbed

VARIANTS = ("lora", "rslora", "dora")
IDS_BT = torch.tensor([[1, 5, 9, 7]])


def config_of(directory: Path, variant: str, dtype: str = "float32") -> Config:
    return Config(
        model=ModelConfig(path=str(directory), dtype=dtype),  # type: ignore[arg-type]
        trainable=TrainableConfig(projector="frozen"),
        lora=LoraConfig(r=4, alpha=8, dropout=0.1, variant=variant),  # type: ignore[arg-type]
    )


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS_BT).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exported(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory, variant: str) -> tuple[Any, Path]:
    """A trained model, and the adapter that is exported of it."""
    config, output = config_of(tiny_llava_dir, variant), tmp_path_factory.mktemp(variant)
    model = perturbed(config, 0.05)
    base = load_model(config.model)
    write_adapter(output, base, trained_state(model), config.model, config.trainable, config.lora)
    return model, output


def test_peft_loads_the_exported_adapter(tiny_llava_dir: Path, exported: tuple[Any, Path], variant: str) -> None:
    model, output = exported
    settings = json.loads((output / CONFIG_FILE).read_text())
    assert (settings["use_rslora"], settings["use_dora"]) == (variant == "rslora", variant == "dora")
    suffixes = {name.rsplit("_proj.", 1)[-1] for name in load_file(output / WEIGHTS_FILE)}
    magnitude = {"lora_magnitude_vector"} if variant == "dora" else set()  # as PEFT names it in a file
    assert suffixes == {"lora_A.weight", "lora_B.weight"} | magnitude
    base = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32"))
    before = logits(base)
    assert_close(logits(with_adapter(base, str(output))), logits(model))
    assert float((before - logits(model)).abs().max()) > 0.01


def test_the_merged_model_is_the_trained_one(tiny_llava_dir: Path, exported: tuple[Any, Path], variant: str) -> None:
    config, (model, _) = config_of(tiny_llava_dir, variant), exported
    merged = load_model(config.model)
    merge_into(merged, trained_state(model), scale=config.lora.scale, dtype=torch.float32, rounding="nearest")
    assert_close(logits(merged), logits(model))


def test_training_continues_the_adapter_of_its_variant(exported: tuple[Any, Path], variant: str) -> None:
    model, output = exported
    for other in VARIANTS:
        config = config_of(output, other)
        continued = load_base(resolve_model(config.model))
        if other == variant:
            prepare_trainable(continued, family_of(continued.config), config)
            assert torch.equal(logits(continued), logits(model))
            continue
        with pytest.raises(ValueError, match=f"adapter with lora.variant={variant}, but lora.variant is {other}"):
            prepare_trainable(continued, family_of(continued.config), config)


def test_the_policy_before_its_first_step_is_the_base_to_the_bit(tiny_llava_dir: Path, variant: str) -> None:
    """In bfloat16 too, where DoRA's norms are rounded."""
    for dtype in ("float32", "bfloat16"):
        config = config_of(tiny_llava_dir, variant, dtype)
        model = load_model(config.model)
        before = logits(model)
        prepare_trainable(model, family_of(model.config), config)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert torch.equal(logits(model), before)


def test_the_plan_counts_the_trained_parameters(exported: tuple[Any, Path], variant: str, tiny_llava_dir: Path) -> None:
    shape = shape_of(str(tiny_llava_dir), config_of(tiny_llava_dir, variant))
    planned = sum(tensor.numel for tensor in shape.tensors if tensor.trained)
    assert planned == sum(value.numel() for value in trained_state(exported[0]).values())
