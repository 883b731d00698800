"""Published shapes of well-known models, so that `bpo plan` needs neither network nor weights.

Source of each line: `config.json` of the Hugging Face repository named in its comment. Omitted values equal the
defaults of the transformers configuration class.
"""

from __future__ import annotations

from typing import Any

_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


def _llava(text: dict[str, Any], model_type: str = "llava") -> dict[str, Any]:
    return {"model_type": model_type, "text_config": {"model_type": "llama", **text}, "vision_config": _CLIP_L_336}


def _qwen25_vl(text: dict[str, Any], vision_intermediate: int, *, tied: bool = False) -> dict[str, Any]:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": vision_intermediate,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    mrope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "rope_parameters": mrope, "tie_word_embeddings": tied},
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


_QWEN2_VL_2B = {
    "model_type": "qwen2_vl",
    "text_config": {
        **_text(1536, 8960, 28, 12, 2, 151936),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
    "tie_word_embeddings": True,
}

_SMOLVLM_2B = {
    "model_type": "smolvlm",
    "text_config": {"model_type": "llama", **_text(2048, 8192, 24, 32, 32, 49280)},
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "scale_factor": 3,
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(_text(4096, 11008, 32, 32, 32, 32064)),  # llava-hf/llava-1.5-7b-hf
    "llava-1.5-13b": _llava(_text(5120, 13824, 40, 40, 40, 32064)),  # llava-hf/llava-1.5-13b-hf
    "llava-next-34b": _llava(_text(7168, 20480, 60, 56, 8, 64064), "llava_next"),  # llava-hf/llava-v1.6-34b-hf
    "qwen2-vl-2b": _QWEN2_VL_2B,  # Qwen/Qwen2-VL-2B-Instruct
    "qwen2.5-vl-3b": _qwen25_vl(_text(2048, 11008, 36, 16, 2, 151936), 3420, tied=True),  # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen2.5-vl-7b": _qwen25_vl(_text(3584, 18944, 28, 28, 4, 152064), 3420),  # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2.5-vl-32b": _qwen25_vl(_text(5120, 27648, 64, 40, 8, 152064), 3456),  # Qwen/Qwen2.5-VL-32B-Instruct
    "qwen2.5-vl-72b": _qwen25_vl(_text(8192, 29568, 80, 64, 8, 152064), 3456),  # Qwen/Qwen2.5-VL-72B-Instruct
    "smolvlm-2b": _SMOLVLM_2B,  # HuggingFaceTB/SmolVLM-Instruct
}
