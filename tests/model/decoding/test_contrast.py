"""The contrasted scores, in closed form and against forward passes without a cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bpo.config.decoding import ContrastConfig
from bpo.data.encode import EncodedPrompt
from bpo.data.families import FAMILIES
from bpo.model.decoding.biased import biased_prompts
from bpo.model.decoding.branch import Branch
from bpo.model.decoding.contrast import contrasted
from bpo.model.decoding.cost import DecodingCost
from tests.model.test_generate import Loaded

TOKENS = [70, 71, 90, 72, 65]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(
    request: pytest.FixtureRequest, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    return Loaded(family_dir(request.param), tmp_path_factory.mktemp("contrast"))


@pytest.fixture(scope="module")
def llava(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(tiny_llava_dir, tmp_path_factory.mktemp("contrast"))


def test_scores_of_plausible_tokens_are_contrasted() -> None:
    image_BV = torch.tensor([[0.8, 0.15, 0.05]]).log()
    biased_BV = torch.tensor([[0.949, 0.05, 0.001]]).log()
    scores_BV = contrasted(image_BV, biased_BV, alpha=1.0, beta=0.1)
    expected = [2 * math.log(0.8) - math.log(0.949), 2 * math.log(0.15) - math.log(0.05)]
    assert scores_BV[0, :2].tolist() == pytest.approx(expected, abs=1e-6)
    assert scores_BV[0, 2] == -math.inf  # 0.05 < 0.1 * 0.8, however improbable it is without the image
    assert contrasted(image_BV, biased_BV, alpha=1.0, beta=0.0).isfinite().all()


def test_without_alpha_or_with_an_equal_view_only_the_cut_is_left() -> None:
    image_BV = torch.tensor([[3.0, 1.0, 0.9, -2.0]])
    cut_BV = torch.tensor([[3.0, 1.0, -math.inf, -math.inf]])
    beta = 0.125  # e^-2 = 0.135 is above it, e^-2.1 = 0.122 is not
    assert torch.equal(contrasted(image_BV, torch.randn(1, 4), alpha=0.0, beta=beta), cut_BV)
    assert torch.allclose(contrasted(image_BV, image_BV, alpha=1.5, beta=beta), cut_BV)


def test_a_suppressed_token_does_not_set_the_cut() -> None:
    scores_BV = contrasted(torch.tensor([[9.0, 1.0, 0.0]]), torch.zeros(1, 3), alpha=1.0, beta=0.1, suppressed=[0])
    assert scores_BV.tolist() == [[-math.inf, 2.0, 0.0]]


def full_logits(loaded: Loaded, prompt: EncodedPrompt, new_ids: list[int]) -> torch.Tensor:
    """Logits [V] after the prompt and `new_ids`: one forward pass of one sequence without a cache."""
    ids_1T = torch.tensor([[*prompt.prefix_ids, *new_ids]])
    extra = loaded.encoder.family.generation_inputs(ids_1T)
    with torch.no_grad():
        output = loaded.model(input_ids=ids_1T, use_cache=False, **prompt.image_inputs, **extra)
    return output.logits[0, -1]


def branches_on(loaded: Loaded, view: str) -> tuple[Branch, Branch, list[EncodedPrompt]]:
    """Branches on the images and on a biased view, and the prompts under it."""
    options = ContrastConfig(views=[view])  # type: ignore[list-item]
    (changed,) = biased_prompts(loaded.encoder, loaded.prompts, options, vcd=False, seeds=range(4)).values()
    image, biased = (
        Branch(name, loaded.model, loaded.encoder, prompts, DecodingCost())
        for name, prompts in (("image", loaded.prompts), (view, changed))
    )
    return image, biased, changed


def test_the_biased_branch_equals_forward_passes_without_a_cache(loaded: Loaded) -> None:
    image, biased, changed = branches_on(loaded, "none")
    with torch.no_grad():
        image.prefill()
        found = [biased.prefill()]
        for token in TOKENS:
            image.step(torch.full((4,), token))
            found.append(biased.step(torch.full((4,), token)))
    for number in (0, len(TOKENS)):
        expected_BV = torch.stack([full_logits(loaded, prompt, TOKENS[:number]) for prompt in changed])
        assert float((found[number] - expected_BV).abs().max()) < 1e-4


def test_with_the_cache_of_the_image_the_contrast_would_vanish(llava: Loaded) -> None:
    image, biased, changed = branches_on(llava, "noise")
    with torch.no_grad():
        for branch in (image, biased):
            branch.prefill()
            for token in TOKENS[:-1]:
                branch.step(torch.full((4,), token))
        own, shared = copy.copy(biased), copy.copy(biased)
        own._cache, shared._cache = copy.deepcopy(biased._cache), copy.deepcopy(image._cache)
        last_B = torch.full((4,), TOKENS[-1])
        image_BV, own_BV, shared_BV = (branch.step(last_B) for branch in (image, own, shared))
    expected_BV = torch.stack([full_logits(llava, prompt, TOKENS) for prompt in changed])
    assert float((shared_BV - image_BV).abs().max()) < 1e-4
    assert float((own_BV - expected_BV).abs().max()) < 1e-4
    assert float((shared_BV - expected_BV)[:3].abs().max()) > 1e-3


def test_noise_depends_on_the_seed_alone_and_is_stronger_for_vdd(llava: Loaded) -> None:
    def noised(vcd: bool, seed: int, step: int = 0) -> torch.Tensor:
        options = ContrastConfig(views=["noise"], noise_step=step)
        views = biased_prompts(llava.encoder, llava.prompts[:1], options, vcd=vcd, seeds=[seed])
        return views["noise"][0].image_inputs["pixel_values"]

    clean = llava.prompts[0].image_inputs["pixel_values"]
    assert torch.equal(noised(True, 1), noised(True, 1)) and not torch.equal(noised(True, 1), noised(True, 2))
    assert torch.equal(noised(True, 1), noised(False, 1, step=500))
    assert torch.equal(noised(False, 1), noised(True, 1, step=999))
    similarity = [float(torch.cosine_similarity(noised(vcd, 1).flatten(), clean.flatten(), 0)) for vcd in (True, False)]
    assert similarity[0] > similarity[1] + 0.2


def test_unknown_tokens_take_the_place_of_the_image(llava: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, encoder = llava.prompts, llava.encoder
    options = ContrastConfig(views=["unk"])
    with pytest.raises(ValueError, match="views has unk, but the model's tokenizer has no unknown token; use none"):
        biased_prompts(encoder, prompts, options, vcd=False, seeds=range(4))
    monkeypatch.setattr(type(encoder.tokenizer), "unk_token_id", 88, raising=False)
    (changed,) = biased_prompts(encoder, prompts, options, vcd=False, seeds=range(4)).values()
    assert changed[3] is prompts[3]  # no image
    for before, after in zip(prompts[:3], changed[:3], strict=True):
        expected = [88 if token == encoder.image_token_id else token for token in before.prefix_ids]
        assert list(after.prefix_ids) == expected and not after.image_inputs
