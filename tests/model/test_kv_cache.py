"""Key-value caches reduce the work and change no answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessorList

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import Encoder, load_encoder
from bpo.data.families import FAMILIES
from bpo.data.families.gemma import Gemma3
from bpo.model import generate, kv_cache
from bpo.model.generate import generate_prompts
from bpo.model.kv_cache import CachedPrefix, Prefixes, ReservedLayer, common_beginning, reserved_cache
from bpo.model.load import load_model
from bpo.records import ContentPart, Turn

SYSTEM = Turn("system", (ContentPart("text", "You are a careful assistant; you answer at length and only in verse."),))
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


def test_a_reserved_layer_holds_what_the_growing_one_holds() -> None:
    """Over many appends, with an external selection of records in between; an append copies nothing."""
    torch.manual_seed(0)
    reserved, growing = ReservedLayer(), DynamicCache().layer_class_to_replicate()
    buffers = set()
    for step in range(400):
        if step == 200:
            for layer in (reserved, growing):
                layer.batch_select_indices(torch.tensor([2, 0]))
        records = 3 if step < 200 else 2
        new = torch.randn(2, records, 4, 7 if step == 0 else 1, 5)
        held, expected = reserved.update(*new), growing.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
        assert reserved.get_seq_length() == growing.get_seq_length() == 7 + step
        buffers.add(held[0].untyped_storage().data_ptr())
    assert len(buffers) < 10


def test_windowed_layers_stay_as_they_are(family_dir: Callable[[str], Path]) -> None:
    model = load_model(ModelConfig(path=str(family_dir("gemma3")), dtype="float32"), torch.device("cpu"))
    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    kinds = [type(layer).__name__ for layer in reserved_cache(model).layers]
    assert kinds == [type(layer).__name__.replace("DynamicLayer", "ReservedLayer") for layer in own.layers]
    assert "DynamicSlidingWindowLayer" in kinds


def test_the_common_beginning_stops_before_an_image_and_short_of_a_whole_prompt() -> None:
    assert common_beginning([(1, 2, 3, 9), (1, 2, 3, 8)]) == (1, 2, 3)
    assert common_beginning([(1, 2, 3), (1, 2, 3, 8)]) == (1, 2)
    assert common_beginning([(1, 7, 3, 9), (1, 7, 3, 8)], end_token_id=7) == (1,)
    assert common_beginning([(4,), (5, 6)]) == ()


def test_a_beginning_is_computed_once_and_only_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, ...]] = []

    def compute(model: Any, ids: tuple[int, ...], inputs_of_ids: Any) -> CachedPrefix:
        computed.append(ids)
        return CachedPrefix(ids, DynamicCache())

    monkeypatch.setattr(kv_cache, "cache_prefix", compute)
    prefixes = Prefixes(object())
    long = list(range(kv_cache.MIN_PREFIX_TOKENS))
    assert prefixes.of(long) is prefixes.of(tuple(long)) and len(computed) == 1
    assert prefixes.of(long[1:]) is None and len(computed) == 1
    for other in range(100, 100 + 2 * kv_cache.MIN_PREFIX_TOKENS):  # others evict it; memory does not grow
        prefixes.of([other] * len(long))
    assert prefixes.of(long) is not None and computed.count(tuple(long)) == 2
    assert Prefixes(object(), enabled=False).of(long) is None


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(
    request: pytest.FixtureRequest, family_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Encoder]:
    root = tmp_path_factory.mktemp("images")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40 + 20 * index, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    model = ModelConfig(path=str(family_dir(request.param)), dtype="float32")
    encoder = load_encoder(Config(model=model, data=DataConfig(image_root=str(root))))
    return load_model(model, torch.device("cpu")), encoder


def prompts_of(encoder: Encoder, with_images: bool) -> list[Any]:
    """Three prompts with a system turn; if a template has none, its text is in the user's turn."""
    prompts = []
    for index, text in enumerate(("What?", "How many dogs are there?", "Where is it, and why?")):
        images = (ContentPart("image"),) if with_images else ()
        turns = [SYSTEM, Turn("user", (*images, ContentPart("text", text)))]
        prompts.append(encoder.encode_prompt(str(index), [f"{index}.png"] if with_images else [], turns))
    return prompts


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The model's scores for each new token [B, V], before sampling."""
    seen: list[torch.Tensor] = []
    processors = generate.logits_processors

    def recording(*arguments: Any) -> LogitsProcessorList:
        def record(input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            seen.append(scores_BV.clone())
            return scores_BV

        return LogitsProcessorList([record, *processors(*arguments)])

    monkeypatch.setattr(generate, "logits_processors", recording)
    return seen


@pytest.mark.parametrize("with_images", [True, False])
def test_no_cache_and_no_prefix_changes_an_answer(
    loaded: tuple[Any, Encoder], with_images: bool, scores: list[torch.Tensor]
) -> None:
    model, encoder = loaded
    prompts = prompts_of(encoder, with_images)
    shared = common_beginning([p.prefix_ids for p in prompts], encoder.image_token_id)
    assert len(shared) >= kv_cache.MIN_PREFIX_TOKENS
    options: dict[str, Any] = {"max_new_tokens": [10, 12, 14], "seeds": [1, 2, 3], **SAMPLING}
    expected: torch.Tensor | None = None
    for cache in ("dynamic", "reserved", "static", "prefix"):
        # Some models keep state of their last batch: make that another batch, with another number of records.
        between = prompts_of(encoder, not with_images)[1:]
        generate_prompts(model, encoder, between, max_new_tokens=[2, 2], seeds=[1, 2], **SAMPLING)
        other: dict[str, Any] = {"cache": cache}
        if cache == "prefix":
            if with_images and not encoder.family.begins_from_cache:
                continue
            other = {"prefix": Prefixes(model, encoder.family.generation_inputs).of(shared)}
            # Windowed layers (Gemma 3) keep only the last tokens: there is nothing to prepend.
            assert (other["prefix"] is None) == isinstance(encoder.family, Gemma3)
        scores.clear()
        generate_prompts(model, encoder, prompts, **options, **other)
        expected = torch.stack(scores) if expected is None else expected
        difference = float((torch.stack(scores) - expected).abs().max())
        assert difference < 1e-4, cache
