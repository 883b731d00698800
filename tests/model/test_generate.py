"""Batched answers of tiny random models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bpo.bootstrap.weaken import weaken_images
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import EncodedPrompt, Encoder, load_encoder
from bpo.data.families import FAMILIES
from bpo.model.generate import GumbelNoise, generate_answers, generate_ids, left_pad
from bpo.model.load import load_model
from bpo.records import ContentPart, Turn

QUESTIONS = ["What?", "What is in this picture, please?", "Where is the dog, and how many cats sit beside it?", "Why?"]


class Loaded:
    def __init__(self, directory: Path, image_root: Path):
        config = Config(
            model=ModelConfig(path=str(directory), dtype="float32"), data=DataConfig(image_root=str(image_root))
        )
        self.encoder: Encoder = load_encoder(config)
        self.model: Any = load_model(config.model, torch.device("cpu"))
        self.prompts: list[EncodedPrompt] = []
        for index, question in enumerate(QUESTIONS):
            with_image = index != 3
            name = f"{index}.png"
            pixels = np.random.default_rng(index).integers(0, 255, (40 + 20 * index, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image_root / name)
            parts = ([ContentPart("image")] if with_image else []) + [ContentPart("text", question)]
            images = [name] if with_image else []
            self.prompts.append(self.encoder.encode_prompt(str(index), images, [Turn("user", tuple(parts))]))

    def answers(self, indices: list[int], **options: Any) -> dict[int, str]:
        sampling = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95} | options
        seeds = [100 + index for index in indices]
        texts = generate_answers(self.model, self.encoder, [self.prompts[i] for i in indices], seeds=seeds, **sampling)
        return dict(zip(indices, texts, strict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(
    request: pytest.FixtureRequest, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    return Loaded(family_dir(request.param), tmp_path_factory.mktemp("generate"))


def test_an_answer_does_not_depend_on_its_batch(loaded: Loaded) -> None:
    alone = {k: v for index in range(4) for k, v in loaded.answers([index]).items()}
    assert loaded.answers([0, 1, 2, 3]) == alone
    assert loaded.answers([3, 1]) == {1: alone[1], 3: alone[3]}
    assert len(set(alone.values())) == 4


def test_seeds_decide_and_greedy_ignores_them(loaded: Loaded) -> None:
    prompts = [loaded.prompts[0]] * 4
    options: dict[str, Any] = {"max_new_tokens": 12, "top_p": 1.0}
    sampled = generate_answers(loaded.model, loaded.encoder, prompts, seeds=[1, 2, 3, 1], temperature=1.0, **options)
    assert sampled[0] == sampled[3]
    assert len(set(sampled)) == 3
    greedy = generate_answers(loaded.model, loaded.encoder, prompts, seeds=[1, 2, 3, 4], temperature=0, **options)
    assert len(set(greedy)) == 1


def test_the_image_reaches_the_model(loaded: Loaded) -> None:
    prompt = loaded.prompts[1]
    images = {k: v.flip(0) * -2 if v.is_floating_point() else v for k, v in prompt.image_inputs.items()}
    other = EncodedPrompt(prompt.record_id, prompt.prefix_ids, images)
    # Probabilities instead of answers: a random model may generate the same few tokens for two images.
    first_BV, other_BV, again_BV = first_probabilities(loaded, [prompt, other, prompt])
    assert float((first_BV - other_BV).abs().max()) > 1e-4
    assert float((first_BV - again_BV).abs().max()) < 1e-6


def first_probabilities(loaded: Loaded, prompts: list[EncodedPrompt]) -> torch.Tensor:
    """The scores [B, V] from which `generate_answers` chooses the first token of each answer."""
    seen: list[torch.Tensor] = []
    head = loaded.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, logits: seen.append(logits[:, -1].softmax(-1)))
    try:
        generate_answers(
            loaded.model,
            loaded.encoder,
            prompts,
            max_new_tokens=1,
            temperature=0,
            top_p=1.0,
            seeds=[0] * len(prompts),
        )
    finally:
        handle.remove()
    return seen[0]


def test_a_weakened_image_is_seen_and_answered(loaded: Loaded) -> None:
    prompt = loaded.prompts[1]
    images = weaken_images(loaded.encoder.encode_images(["1.png"]), loaded.encoder.family, noise_step=900, seed=1)
    weakened = replace(prompt, image_inputs=images.inputs)
    clean = prompt.image_inputs
    assert {k: v.shape for k, v in weakened.image_inputs.items()} == {k: v.shape for k, v in clean.items()}
    assert all(torch.equal(weakened.image_inputs[k], clean[k]) for k in clean if k != "pixel_values")
    answers = generate_answers(
        loaded.model, loaded.encoder, [prompt, weakened], max_new_tokens=5, temperature=1.0, top_p=1.0, seeds=[0, 1]
    )
    assert all(answers)
    ids_1T = torch.tensor(prompt.prefix_ids)[None]
    inputs = loaded.encoder.family.generation_inputs(ids_1T)
    with torch.no_grad():
        first, other = (
            loaded.model(input_ids=ids_1T, **inputs, **encoded.image_inputs).logits[0, -1].softmax(-1)
            for encoded in (prompt, weakened)
        )
    assert float((first - other).abs().max()) > 1e-4


def test_control_tokens_never_come_out(loaded: Loaded) -> None:
    encoder, head = loaded.encoder, loaded.model.get_output_embeddings()
    generate = loaded.model.generate
    favoured = list(encoder.suppressed_token_ids)

    def favouring(*args: Any, **kwargs: Any) -> torch.Tensor:
        def favour(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            logits[..., favoured] += 1000.0
            return logits

        handle = head.register_forward_hook(favour)
        try:
            out = generate(*args, **kwargs)
        finally:
            handle.remove()
        new = out[:, kwargs["input_ids"].shape[1] :]
        assert not set(new.flatten().tolist()) & (set(favoured) - {encoder.pad_token_id})
        return out

    loaded.model.generate = favouring
    try:
        assert any(loaded.answers([0, 1]).values())
    finally:
        loaded.model.generate = generate


def test_the_models_own_generation_settings_do_not_interfere(loaded: Loaded) -> None:
    plain = loaded.answers([0, 1])
    own = loaded.model.generation_config
    own.repetition_penalty, own.top_k = 5.0, 1
    try:
        assert loaded.answers([0, 1]) == plain
        assert loaded.model.generation_config is own
    finally:
        own.repetition_penalty, own.top_k = 1.0, 50


def test_each_record_stops_at_eos_or_its_budget(loaded: Loaded) -> None:
    head = loaded.model.get_output_embeddings()
    eos = loaded.encoder.eos_token_id
    step = iter(range(1000))

    def end_row_one_at_third_token(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        now = next(step)
        logits[:, :, eos] = -1e9
        logits[1, -1, eos] = 1e9 if now == 2 else -1e9
        return logits

    handle = head.register_forward_hook(end_row_one_at_third_token)
    try:
        results = generate_ids(
            loaded.model,
            [[5, 6, 7], [8, 9], [10]],
            pad_token_id=loaded.encoder.pad_token_id,
            eos_token_ids=[eos],
            suppressed_token_ids=loaded.encoder.suppressed_token_ids,
            max_new_tokens=[4, 9, 7],
            temperature=0,
            top_p=1.0,
            seeds=[0, 0, 0],
        )
    finally:
        handle.remove()
    assert [(len(ids), ended) for ids, ended in results] == [(4, False), (2, True), (7, False)]
    assert next(step) == 7  # the batch ends with its last record, not at its largest budget


def test_an_empty_batch_has_no_answers(loaded: Loaded) -> None:
    assert loaded.answers([]) == {}


def test_gumbel_noise_samples_the_softmax() -> None:
    probabilities_V = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    scores_BV = probabilities_V.log().expand(500, -1)
    noise = GumbelNoise(range(500), torch.device("cpu"))
    counts: Counter[int] = Counter()
    for _ in range(40):
        counts.update(noise(None, scores_BV).argmax(-1).tolist())  # type: ignore[arg-type]
    shares = [counts[v] / 20_000 for v in range(5)]
    assert shares == pytest.approx(probabilities_V.tolist(), abs=0.015)  # 4 standard deviations
    assert counts[4] == 0


def test_left_padding_ends_together() -> None:
    ids_BT, mask_BT = left_pad([[1, 2, 3], [4]], pad_token_id=9)
    assert ids_BT.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_batches_of_unequal_lengths_are_an_error(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="1 prompts, 2 seeds"):
        generate_answers(
            loaded.model, loaded.encoder, loaded.prompts[:1], max_new_tokens=1, temperature=0, top_p=1, seeds=[1, 2]
        )
