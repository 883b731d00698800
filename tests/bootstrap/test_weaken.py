"""Answers to weakened images. Run: python -m pytest tests/bootstrap/test_weaken.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.bootstrap.noise import diffuse
from bpo.bootstrap.weaken import answer_weakened, weaken_prompt
from bpo.config import Config, DataConfig, ModelConfig
from bpo.config_bootstrap import WeakenConfig
from bpo.data.encode import load_encoder
from bpo.data.formats import read_annotations
from bpo.model.load import load_model

OPTIONS = WeakenConfig(temperature=0.5, max_new_tokens=10)


@pytest.fixture(params=["tiny_llava_dir", "tiny_qwen_dir"])
def setting(request: pytest.FixtureRequest, photos: Path):
    path = str(request.getfixturevalue(request.param))
    config = Config(model=ModelConfig(path=path, dtype="float32"), data=DataConfig(image_root=str(photos)))
    encoder, model = load_encoder(config), load_model(config.model, torch.device("cpu"))
    annotations = read_annotations(photos / "annotations.json").annotations[:3]
    return model, encoder, [encoder.encode_prompt(a.id, a.images, a.prompt) for a in annotations]


def test_pixels_are_noised_by_the_schedule_with_noise_of_the_seed(setting) -> None:
    _, encoder, (prompt, *_) = setting
    clean = prompt.image_inputs["pixel_values"]
    first, again, other = (
        weaken_prompt(prompt, encoder.family, 900, seed).image_inputs["pixel_values"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    epsilon = (first - diffuse(clean, 900, torch.zeros_like(clean))) / 0.931051
    assert epsilon.mean().item() == pytest.approx(0, abs=0.1)
    assert epsilon.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(prompt.image_inputs["pixel_values"], clean)


def test_without_noise_the_clean_image_is_answered(setting) -> None:
    model, encoder, prompts = setting
    assert weaken_prompt(prompts[0], encoder.family, -1, 5) is prompts[0]
    clean = answer_weakened(model, encoder, prompts, OPTIONS, -1, [1, 2, 3])
    weak = answer_weakened(model, encoder, prompts, OPTIONS, 999, [1, 2, 3])
    assert clean != weak


def test_a_model_that_ignores_images_answers_alike_at_every_step(setting) -> None:
    """Nothing but the image is changed: same seed, same answer where the image says nothing."""
    model, encoder, prompts = setting
    projector = model.get_submodule(encoder.family.projector_modules[0])
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.zero_()
    answers = [answer_weakened(model, encoder, prompts, OPTIONS, step, [1, 2, 3]) for step in (-1, 0, 500, 999)]
    assert all(one == answers[0] for one in answers)


def test_the_clean_image_never_reaches_the_model(setting) -> None:
    """Contrast decoding would show the model both images; here each call gets the noised one alone."""
    model, encoder, prompts = setting
    seen: list[torch.Tensor] = []
    generate = model.generate
    model.generate = lambda **kwargs: seen.append(kwargs["pixel_values"]) or generate(**kwargs)
    answer_weakened(model, encoder, prompts, OPTIONS, 900, [1, 2, 3])
    weakened = [weaken_prompt(p, encoder.family, 900, s) for p, s in zip(prompts, (1, 2, 3), strict=True)]
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat([p.image_inputs["pixel_values"] for p in weakened]))
