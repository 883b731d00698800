"""Embeddings of prompts: vision features of every family, means, and sentence encoders.

Shape letters: D size of an embedding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from bpo.config.training import Config, LossConfig, ModelConfig
from bpo.data.families import FAMILIES
from bpo.model.load import load_model
from bpo.model.prompt_embedding import (
    SentenceEncoder,
    check_prompt_embedding,
    image_means,
    joined,
    num_entries,
    token_means,
)
from tests.sample_groups import encoder_of
from tests.sentence_encoder import MAX_TOKENS, tiny_sentence_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sentence_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sentence_encoder(tmp_path_factory.mktemp("sentences") / "bert")


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_image_features_are_those_that_the_projector_reads(
    name: str, family_dir: Callable[[str], Path], photo_root: Path
) -> None:
    """Computed for several prompts at once, as many rows as their images have, one prompt without an image."""
    encoder = encoder_of(family_dir(name), photo_root)
    model = load_model(ModelConfig(path=str(family_dir(name)), dtype="float32"))
    prompts = [encoder.encode_images(images).inputs for images in (["wide.png"], [], ["tall.png", "square.png"])]
    family = encoder.family
    read: list[torch.Tensor] = []
    handle = model.get_submodule(family.projector_modules[0]).register_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0])
    )
    entries = [num_entries(inputs) for inputs in prompts]
    together = family.batch_image_inputs([inputs for inputs in prompts if inputs])
    means = image_means(model, family, together, entries)
    size = means.shape[1]
    for inputs, mean_D in zip(prompts, means, strict=True):
        read.clear()
        expected_D = torch.zeros(size)
        if inputs:
            model.model.get_image_features(**inputs)
            # A projector that merges patches gets them side by side in the last dimension.
            expected_D = read[0].reshape(-1, size).mean(0)
            assert expected_D.norm() > 0.1
        torch.testing.assert_close(mean_D, expected_D, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert (means[0] - means[2]).norm() > 1e-3


def test_token_means(tiny_llava_dir: Path) -> None:
    model = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="bfloat16"))
    rows = model.get_input_embeddings().weight.detach().float()
    found = token_means(model, [(3, 5, 5), (), (7,)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack([(rows[3] + 2 * rows[5]) / 3, torch.zeros(32), rows[7]]))


def test_the_cosine_of_joined_parts_is_the_mean_of_their_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(2, 5, generator=generator), 100 * torch.randn(2, 3, generator=generator)
    vectors = joined(text, image)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    cosines = [F.cosine_similarity(part[0], part[1], dim=0) for part in (text, image)]
    torch.testing.assert_close(vectors[0] @ vectors[1], sum(cosines) / 2)
    alone = joined(text, torch.zeros(2, 3))
    torch.testing.assert_close(alone[0] @ alone[1], cosines[0])


def test_a_sentence_is_the_mean_over_its_tokens(sentence_dir: Path) -> None:
    """Texts of different lengths in one batch, one of them cut at the encoder's limit, one empty."""
    encoder = SentenceEncoder(str(sentence_dir), CPU)
    long = "What is the dog doing ? is the cat a dog ?"
    texts = ["What color is the dog ?", "cat", long, ""]
    model = AutoModel.from_pretrained(sentence_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(sentence_dir)
    found = encoder.embed(texts)
    for text, mean_D in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        if text == long:
            ids = [*ids[: MAX_TOKENS - 1], ids[-1]]
        with torch.no_grad():
            expected_D = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(mean_D, expected_D, atol=1e-5, rtol=1e-5)
    assert F.cosine_similarity(found[0], found[1], dim=0) < 0.99


def test_loading_draws_nothing_from_the_generator_of_training(sentence_dir: Path) -> None:
    """The pooler, which the files lack, gets random weights."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SentenceEncoder(str(sentence_dir), CPU)
    assert torch.equal(torch.rand(3), expected)


def without(directory: Path, *names: str, **config: Any) -> Path:
    for name in names:
        (directory / name).unlink()
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d / "gone", "gone': no such directory; set it to `model`, or to the directory of a sentence enc"),
        (lambda d: without(d, "config.json"), "the directory has no config.json, so it is not a model"),
        (lambda d: without(d, "model.safetensors"), "the directory has no weights"),
        (lambda d: without(d, "tokenizer.json", "tokenizer_config.json"), "the directory has no tokenizer"),
        (lambda d: without(d, is_encoder_decoder=True), "`bert` has a decoder, which needs inputs of its own"),
        (lambda d: Path("all-MiniLM-L6-v2"), "'all-MiniLM-L6-v2': no such directory"),
    ],
    ids=["gone", "no config", "no weights", "no tokenizer", "decoder", "hub id"],
)
def test_what_is_not_a_sentence_encoder_is_refused(
    sentence_dir: Path, tmp_path: Path, spoil: Callable[[Path], Path], message: str
) -> None:
    path = spoil(Path(shutil.copytree(sentence_dir, tmp_path / "encoder")))
    config = Config(loss=LossConfig(prompt_embedding=str(path)))
    with pytest.raises(ValueError, match=f"^loss.prompt_embedding is .*{message}"):
        check_prompt_embedding(config)


def test_damaged_weights_are_named(sentence_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sentence_dir, tmp_path / "encoder"))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="^loss.prompt_embedding is .*encoder"):
        SentenceEncoder(str(directory), CPU)


def test_good_settings_pass(sentence_dir: Path) -> None:
    check_prompt_embedding(Config())
    check_prompt_embedding(Config(loss=LossConfig(prompt_embedding=str(sentence_dir))))
