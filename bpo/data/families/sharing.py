"""Determines from a text model's config whether several completions can share one prefix."""

from __future__ import annotations

from typing import Any

# Text models of transformers with softmax attention over all earlier tokens through AttentionInterface in every layer,
# subject to the config checks below. Each is tested against separate sequences (tests/model/test_policy_sharing.py).
# All other models are trained on separate sequences, which is always correct.
PLAIN_CAUSAL = frozenset(
    "llama mistral qwen2 qwen3 qwen3_moe qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text".split()
)


def why_separate(text_config: Any, share_prefix: str = "auto", *, looks_ahead_in_images: bool = False) -> str | None:
    """Returns why completions cannot share the keys and values of their prefix, or None if they can.

    Args:
        text_config: Config of the language model.
        share_prefix: Value of `model.share_prefix`; "never" is a sufficient reason.
        looks_ahead_in_images: Whether image tokens attend to later tokens of their image.
    """
    if share_prefix == "never":
        return "model.share_prefix is never"
    reasons = []
    if looks_ahead_in_images:
        reasons.append("image tokens attend to each other in both directions")
    if window := sliding_window(text_config):
        reasons.append(f"it has sliding-window attention with windows of {window} tokens")
    other = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        reasons.append(f"it has layers of {' and '.join(sorted(other))}")
    if getattr(text_config, "attn_logit_softcapping", None):
        reasons.append("its attention scores are soft-capped")
    if getattr(text_config, "use_bidirectional_attention", False):
        reasons.append("its attention is not causal")
    if not reasons and text_config.model_type not in PLAIN_CAUSAL:
        reasons.append(f"`{text_config.model_type}` is not among the text models known to use plain causal attention")
    return "; ".join(reasons) or None


def sliding_window(text_config: Any) -> int | None:
    """Returns the attention window in tokens if any layer has one, or None if all attend to all earlier tokens.

    With `layer_types`, the window is set per layer (Gemma, Qwen); otherwise it applies to all layers (Mistral), unless
    `use_sliding_window` is false.
    """
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        return window if "sliding_attention" in layer_types else None
    return window if getattr(text_config, "use_sliding_window", True) else None
