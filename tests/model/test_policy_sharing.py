"""Text models with the same vision part: which of them share a prefix; all give the same training results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bpo.config.training import ModelConfig
from bpo.data.collate import collate_groups
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel
from tests.model.test_policy import TOLERANCE, packed_logp, separate_logp
from tests.sample_groups import encode_all, encoder_of, three_groups
from tests.tiny_families import tiny_internvl

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
WINDOW = {"sliding_window": 16}  # shorter than every prefix
TEXT_MODELS: dict[str, tuple[type, dict[str, Any], bool]] = {
    "llama": (LlamaConfig, {}, True),
    "mistral": (MistralConfig, {"sliding_window": None}, True),
    "mistral with a window": (MistralConfig, WINDOW, False),
    "qwen2": (Qwen2Config, {}, True),
    "qwen2 with a window": (Qwen2Config, {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}, False),
    "qwen3": (Qwen3Config, {"head_dim": 8}, True),
    "qwen3_moe": (Qwen3MoeConfig, {"head_dim": 8, **EXPERTS}, True),
    "gemma2": (
        Gemma2Config,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5, **WINDOW},
        False,
    ),
    "phi3": (Phi3Config, WINDOW, False),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_packed_or_separate_the_log_probs_are_those_of_the_plain_model(
    name: str, tmp_path: Path, photo_root: Path
) -> None:
    text_type, options, shares = TEXT_MODELS[name]
    directory = tiny_internvl(tmp_path / "model", text_type, **options)
    encoder = encoder_of(directory, photo_root)
    assert (encoder.family.separate_reason is None) == shares
    encoded = encode_all(encoder, three_groups())
    model = load_model(ModelConfig(path=str(directory), dtype="float32"), for_training=True)
    assert model.config.text_config._attn_implementation.startswith("bpo") == shares
    batch = collate_groups(encoded, encoder.family)
    assert (not batch.sequence_inputs) == shares
    with torch.no_grad():
        logp_N = packed_logp(PolicyModel(model), batch)
        plain = load_model(ModelConfig(path=str(directory), dtype="float32"))
        expected_N = separate_logp(plain, encoder, encoded)
    torch.testing.assert_close(logp_N, expected_N, atol=TOLERANCE["logp"], rtol=0)


def test_a_cap_on_attention_scores_is_kept(tmp_path: Path, photo_root: Path) -> None:
    """transformers' SDPA silently ignores it; the capped and the uncapped model must differ."""
    outputs = []
    for cap in (0.5, None):
        options = {**TEXT_MODELS["gemma2"][1], "attn_logit_softcapping": cap, "layer_types": ["full_attention"] * 2}
        directory = tiny_internvl(tmp_path / str(cap), Gemma2Config, **options)
        encoder = encoder_of(directory, photo_root, share_prefix="never")
        batch = collate_groups(encode_all(encoder, three_groups()), encoder.family)
        config = ModelConfig(path=str(directory), dtype="float32", share_prefix="never")
        with torch.no_grad():
            outputs.append(packed_logp(PolicyModel(load_model(config, for_training=True)), batch))
    assert float((outputs[0] - outputs[1]).abs().max()) > 0.01
