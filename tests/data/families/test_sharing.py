"""Prefix sharing of text models, determined from their configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from bpo.data.families import FAMILIES, family_of
from bpo.data.families.sharing import why_separate

SMALL: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SMALL), None),
        (MistralConfig(**SMALL, sliding_window=None), None),
        (MistralConfig(**SMALL, sliding_window=4096), "windows of 4096 tokens"),
        (Qwen2Config(**SMALL), None),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=512, max_window_layers=1), "windows of 512"),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=512, max_window_layers=3), None),
        (Qwen3Config(**SMALL), None),
        (
            Qwen3Config(**SMALL, layer_types=["full_attention", "chunked_attention", "full_attention"]),
            "chunked_attention",
        ),
        (Gemma2Config(**SMALL, layer_types=["full_attention"] * 3), "scores are soft-capped"),
        (Gemma3TextConfig(**SMALL, sliding_window=8), "windows of 8 tokens"),
        (Gemma3TextConfig(**SMALL, layer_types=["full_attention"] * 3, use_bidirectional_attention=True), "not causal"),
        (Phi3Config(**SMALL, sliding_window=None, pad_token_id=0), "`phi3` is not among"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else str(value),
)
def test_only_plain_causal_attention_shares(config: Any, reason: str | None) -> None:
    found = why_separate(config)
    assert found is None if reason is None else reason in str(found)


def test_share_prefix_never_is_a_reason() -> None:
    assert why_separate(LlamaConfig(**SMALL), "never") == "model.share_prefix is never"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_but_gemma_shares(name: str, family_dir: Callable[[str], Path]) -> None:
    reason = family_of(AutoConfig.from_pretrained(family_dir(name))).separate_reason
    assert (reason is None) == (name != "gemma3"), reason
