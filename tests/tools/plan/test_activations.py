"""What layers keep, traced, against closed forms."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bpo.config.training import Config, TrainableConfig
from bpo.tools.plan.activations import ActivationCosts, activation_costs
from bpo.tools.plan.shape import ModelShape, shape_of

LLAMA = {
    "model_type": "llava",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 320,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}


def shape(num_layers: int = 5, **trainable: str) -> ModelShape:
    from transformers import AutoConfig

    text = {**LLAMA["text_config"], "num_hidden_layers": num_layers}  # type: ignore[dict-item]
    model_config = AutoConfig.for_model(**{**LLAMA, "text_config": text})
    return shape_of("tiny", Config(trainable=TrainableConfig(**trainable)), model_config)  # type: ignore[arg-type]


@functools.cache
def costs_of(num_layers: int, checkpointing: str, **trainable: str) -> ActivationCosts:
    return activation_costs(shape(num_layers, **trainable), checkpointing)


def kept_by_a_layer(checkpointing: str, **trainable: str) -> float:
    """Bytes a token that one more layer keeps."""
    five, six = (costs_of(n, checkpointing, **trainable).language.kept.per_row for n in (5, 6))
    return six - five


def test_a_llama_layer_trained_in_full_keeps_what_its_equations_say() -> None:
    """docs/sizing.md derives it; bf16, H hidden, Q and K the widths of queries and of keys, I of the MLP, A heads."""
    H, Q, K, I, A = 96, 96, 32, 320, 6  # noqa: E741, N806
    norms = 2 * (4 * H + 2 * H + 2 * H + 4)  # fp32 input, normed, scaled, and one reciprocal root
    attention = 2 * Q + 2 * K + 2 * K + 2 * Q + 2 * Q + 4 * A  # q, k, v, its output twice, a log-sum a head
    mlp = 4 * 2 * I  # gate, its activation, up, their product
    assert kept_by_a_layer("none", language="full") == norms + attention + mlp


def test_full_recomputation_keeps_the_inputs_of_layers() -> None:
    for language in ("full", "lora"):
        assert kept_by_a_layer("full", language=language) == 2 * 96


def test_selective_lies_between_and_adapters_keep_more_than_frozen_weights() -> None:
    kept = {mode: costs_of(5, mode, language="lora").language.kept(100) for mode in ("none", "selective", "full")}
    assert kept["full"] < kept["selective"] < kept["none"]
    frozen = costs_of(5, "none", language="frozen").language.kept(100)
    assert frozen < kept["none"]


def kept_per_token(**options: Any) -> float:
    return activation_costs(shape(language="lora"), "none", **options).language.kept.per_row


def test_dropout_keeps_bytes_on_a_gpu_and_noise_elsewhere() -> None:
    """Of each of a layer's seven linears' inputs: one byte an element, or two in bf16."""
    inputs = 6 * 96 + 320  # q, k, v, o, gate and up take the hidden size, down the MLP's
    assert kept_per_token(device="cpu") - kept_per_token(device="cuda") == 5 * inputs


def test_zero3_keeps_the_inputs_of_frozen_linears() -> None:
    """q, k and v share one, gate and up another, o and down have their own."""
    shared = 96 + 96 + 96 + 320
    assert kept_per_token(gathers=True) - kept_per_token() == 5 * 2 * shared


def test_a_frozen_tower_keeps_nothing_but_its_output() -> None:
    frozen, trained = (costs_of(5, "none", vision=x).vision for x in ("frozen", "full"))
    assert frozen.kept.per_row == 2 * 32 * 2  # the last block's output and the one handed on
    assert trained.kept.per_row > 10 * frozen.kept.per_row


def test_offload_leaves_two_inputs_of_layers_on_the_device() -> None:
    full, offload = (costs_of(5, mode, language="lora") for mode in ("full", "offload"))
    for name in ("kept", "forward", "backward"):
        before, after = getattr(full.language, name), getattr(offload.language, name)
        assert before(1000) - after(1000) == pytest.approx(3 * 2 * 96 * 1000)
    assert offload.language.host_bytes(1000) == 5 * 2**18  # 192,000 bytes each, in blocks of a power of 2
    assert full.language.host_bytes(1000) == offload.vision.host_bytes(1000) == 0


@pytest.mark.parametrize("rows", [700, 1500])
def test_costs_are_affine_in_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two sizes that are traced predict others."""
    from bpo.tools.plan import activations

    costs = costs_of(5, "selective").language
    monkeypatch.setattr(activations, "_ROWS", (rows, rows + 1))
    monkeypatch.setattr(activations, "_LAYERS", (4, 5))
    other = activation_costs(shape(), "selective").language
    assert costs.backward(rows) == pytest.approx(other.backward(rows), rel=0.005)
    assert costs.kept(rows) == pytest.approx(other.kept(rows), rel=0.005)


def test_a_model_of_few_layers_is_traced_whole() -> None:
    kept = [costs_of(n, "none", language="full").language.kept.per_row for n in (1, 2, 3, 4)]
    steps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 3)
