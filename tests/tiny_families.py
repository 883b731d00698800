"""Tiny random models of every supported family except LLaVA-1.5 and Qwen2.5-VL (tests/tiny.py), saved like those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.tiny import LLAVA_TEMPLATE, QWEN_TEMPLATE, byte_tokenizer, save, sharpen, tiny_llava, tiny_qwen

TILE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28], [84, 84]]
# Two newlines are one token in most real vocabularies; newlines around an image then merge with those of the text.
MERGES = (("\u010a", "\u010a"),)

_PARTS = "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
CHATML_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "IMAGE")
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    + _PARTS.replace("IMAGE", "<start_of_image>")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    + _PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tiny_llava_next(directory: Path) -> Path:
    """LLaVA-NeXT on Mistral: 28 px tiles of 16 patches, canvases of up to 3 x 3 tiles."""
    torch.manual_seed(0)
    tokenizer = _llava_tokenizer()
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=MistralConfig(sliding_window=None, **_text(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return _finish(directory, LlavaNextForConditionalGeneration(config), tokenizer, images, LLAVA_TEMPLATE)


def tiny_llava_onevision(directory: Path) -> Path:
    """LLaVA-OneVision on Qwen2: 28 px tiles of 16 patches, canvases above 4 tiles are scaled down."""
    torch.manual_seed(0)
    tokenizer = _chatml_tokenizer(["<image>", "<video>"])
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"),
        video_token_id=_id(tokenizer, "<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=False,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS)
    template = CHATML_TEMPLATE.replace("IMAGE", "<image>\n")
    return _finish(directory, LlavaOnevisionForConditionalGeneration(config), tokenizer, images, template)


def tiny_qwen2_vl(directory: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    config = Qwen2VLConfig(
        vision_config=dict(
            depth=2,
            embed_dim=32,
            hidden_size=32,
            num_heads=2,
            mlp_ratio=2,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        text_config=dict(**_text(tokenizer), rope_parameters=_mrope()),
        **_qwen_ids(tokenizer),
    )
    return _finish(directory, Qwen2VLForConditionalGeneration(config), tokenizer, _qwen_images(), QWEN_TEMPLATE)


def tiny_qwen3_vl(directory: Path, *, moe: bool = False) -> Path:
    """Qwen3-VL with features of two layers of the tower added in the language model; `moe`: two of four experts."""
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=32,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    # Three layers: features added after the last one would not affect the answer.
    text = dict(
        **_text(tokenizer, num_hidden_layers=3), head_dim=8, rope_parameters=_mrope() | {"mrope_interleaved": True}
    )
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
    config_type, model_type = (
        (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        if moe
        else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    )
    config = config_type(
        vision_config=vision,
        text_config=text | (experts if moe else {}),
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return _finish(directory, model_type(config), tokenizer, _qwen_images(), QWEN_TEMPLATE)


def tiny_internvl(directory: Path, text_type: type = Qwen2Config, **text: Any) -> Path:
    """InternVL on a text model of choice: 28 px tiles of 4 tokens, up to 4 of them and a thumbnail."""
    torch.manual_seed(0)
    special = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    names = ["start_image_token", "end_image_token", "context_image_token", "video_token"]
    tokenizer = _chatml_tokenizer(special, extra_special_tokens=dict(zip(names, special, strict=True)))
    config = InternVLConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[TILE, TILE],
            patch_size=[7, 7],
        ),
        text_config=text_type(**_text(tokenizer), **text),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, min_patches=1, max_patches=4)
    template = CHATML_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n")
    return _finish(directory, InternVLForConditionalGeneration(config), tokenizer, images, template)


def tiny_gemma3(directory: Path, **image_options: Any) -> Path:
    """Gemma 3: 4 tokens per image, a window of 24 tokens in two of three layers, tied embeddings."""
    torch.manual_seed(0)
    image = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
    tokenizer = byte_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *image],
        MERGES,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=dict(zip(["boi_token", "image_token", "eoi_token"], image, strict=True)),
    )
    text = Gemma3TextConfig(
        **_text(tokenizer, num_hidden_layers=3),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    )
    config = Gemma3Config(
        vision_config=_siglip() | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=_id(tokenizer, image[0]),
        image_token_index=_id(tokenizer, image[1]),
        eoi_token_index=_id(tokenizer, image[2]),
        tie_word_embeddings=True,
    )
    images = Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE}, **image_options)
    model = Gemma3ForConditionalGeneration(config)
    # transformers leaves it at 0: no image would reach the language model.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=1.0)
    # Head and embedding are tied: large weights would answer every token with itself, regardless of the image.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.01)
    return _finish(directory, model, tokenizer, images, GEMMA_TEMPLATE)


def tiny_idefics3(directory: Path) -> Path:
    """Idefics3: 28 px tiles of 4 tokens, up to 3 x 3 of them and the whole image; the tags of tiles are plain text."""
    return _idefics(directory, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, [])


def tiny_smolvlm(directory: Path) -> Path:
    """SmolVLM: like Idefics3, but the tags of tiles are special tokens."""
    tags = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
    return _idefics(directory, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, tags)


def _idefics(directory: Path, config_type: Any, model_type: Any, images_type: Any, tags: list[str]) -> Path:
    torch.manual_seed(0)
    special = ["<|im_start|>", "<|endoftext|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", *tags]
    tokenizer = byte_tokenizer(
        special, MERGES, bos_token="<|im_start|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=7,
    )
    config = config_type(
        vision_config=vision,
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    images = images_type(size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE})
    return _finish(directory, model_type(config), tokenizer, images, IDEFICS_TEMPLATE)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "gemma3": tiny_gemma3,
    "idefics3": tiny_idefics3,
    "internvl": tiny_internvl,
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "qwen2_5_vl": tiny_qwen,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "qwen3_vl_moe": lambda directory: tiny_qwen3_vl(directory, moe=True),
    "smolvlm": tiny_smolvlm,
}


def _finish(directory: Path, model: Any, tokenizer: Any, images: Any, template: str) -> Path:
    # Saved in parts: most whole processors cannot be built without torchvision (their video part).
    tokenizer.chat_template = template
    sharpen(model)
    return save(directory, model, tokenizer, images)


def _text(tokenizer: Any, **changed: Any) -> dict[str, Any]:
    """Sizes and token ids of all text models."""
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **sizes, **ids, **changed}


def _clip() -> dict[str, Any]:
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    return {"model_type": "clip_vision_model", "image_size": TILE, "patch_size": 7, **sizes}


def _siglip() -> dict[str, Any]:
    return {**_clip(), "model_type": "siglip_vision_model", "vision_use_head": False}


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _llava_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<pad>", "<image>"]
    return byte_tokenizer(special, MERGES, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _chatml_tokenizer(more: list[str], **named: Any) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    return byte_tokenizer(special, MERGES, eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _chatml_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": _id(tokenizer, f"<|{token}|>") for name, token in tokens.items()}


def _qwen_images() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112})
