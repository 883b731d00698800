"""Every shipped recipe is a valid configuration with a description."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.config.io import load_config

RECIPES = sorted((Path(__file__).resolve().parent.parent / "bpo" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_documented(path: Path) -> None:
    config = load_config(["--config", str(path)])
    assert path.read_text().startswith("# ")
    assert config.train.output_dir == f"runs/{path.stem}"


def test_the_paper_recipe_has_the_papers_values() -> None:
    config = load_config(["--config", str(RECIPES[0].parent / "llava-1.5-7b.yaml")])
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (32, 256, 0.05)
    assert (config.train.lr, config.loss.beta, config.train.epochs, config.train.warmup_ratio) == (2e-6, 0.1, 2, 0.03)
    assert (config.bootstrap.weaken.noise_step, config.bootstrap.weaken.temperature) == (900, 0.2)
    assert (config.bootstrap.inject.temperature, config.bootstrap.inject.top_p) == (0.8, 0.95)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_llava_recipes_show_the_model_what_it_was_trained_on(size: str) -> None:
    config = load_config(["--config", str(RECIPES[0].parent / f"llava-1.5-{size}.yaml")])
    assert config.data.image_aspect == "pad"
    assert config.data.system_prompt == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )


@pytest.mark.parametrize("path", [p for p in RECIPES if "llava" not in p.stem], ids=lambda p: p.stem)
def test_other_recipes_leave_images_and_prompts_to_the_model(path: Path) -> None:
    config = load_config(["--config", str(path)])
    assert (config.data.image_aspect, config.data.system_prompt) == ("processor", "")
