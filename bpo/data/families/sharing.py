"""Which text models can attend from several completions to one prefix, read from their configs."""

from __future__ import annotations

from typing import Any

# Text models of transformers whose attention is a softmax over all earlier tokens and goes through its
# AttentionInterface in every layer, unless the config says otherwise below. Each was compared with separate sequences
# (tests/model/test_policy_sharing.py); any other is trained on separate sequences, which is right for all.
PLAIN_CAUSAL = frozenset(
    "llama mistral qwen2 qwen3 qwen3_moe qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text".split()
)


def why_separate(text_config: Any, share_prefix: str = "auto", *, looks_ahead_in_images: bool = False) -> str | None:
    """Why completions cannot share their prefix's keys and values, or None where they can.

    Args:
        text_config: Of the language model.
        share_prefix: `model.share_prefix`; "never" is a reason by itself.
        looks_ahead_in_images: The attention mask lets image tokens see later tokens of their image.
    """
    if share_prefix == "never":
        return "model.share_prefix is never"
    reasons = []
    if looks_ahead_in_images:
        reasons.append("the tokens of an image attend to each other in both directions")
    if window := sliding_window(text_config):
        reasons.append(f"its attention slides over windows of {window} tokens")
    other = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        reasons.append(f"it has layers of {' and '.join(sorted(other))}")
    if getattr(text_config, "attn_logit_softcapping", None):
        reasons.append("its attention scores are capped")
    if getattr(text_config, "use_bidirectional_attention", False):
        reasons.append("its attention is not causal")
    if not reasons and text_config.model_type not in PLAIN_CAUSAL:
        reasons.append(f"`{text_config.model_type}` is not among the text models known to attend plainly and causally")
    return "; ".join(reasons) or None


def sliding_window(text_config: Any) -> int | None:
    """The attention window of some layer, in tokens, or None where every layer attends to all earlier tokens.

    A config with `layer_types` says it a layer (Gemma, Qwen); one without applies its window in all (Mistral), unless
    `use_sliding_window` is off.
    """
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        return window if "sliding_attention" in layer_types else None
    return window if getattr(text_config, "use_sliding_window", True) else None
