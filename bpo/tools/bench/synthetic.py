"""Synthetic benchmark inputs: LLaVA-1.5-7B and Qwen2.5-VL-7B at full or reduced size with random weights; groups of
exact lengths.
"""

from __future__ import annotations

import json
import math
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PATCH = 14


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        divisor: Of every width of the full model.
        layers, vision_layers: Depth of the language model and of the vision tower.
        family: "llava" (LLaVA-1.5-7B) or "qwen" (Qwen2.5-VL-7B).
    """

    divisor: int = 1
    layers: int = 32
    vision_layers: int = 24
    family: str = "llava"

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that becomes one image token; Qwen2.5-VL merges 2 x 2 patches."""
        return PATCH * (2 if self.family == "qwen" else 1)


# Depth and widths are divided alike, except with the suffix -4l: full widths and vocabulary, four layers of each part.
SHAPES = {
    "llava-1.5-7b": Shape(),
    "llava-1.5-7b-4l": Shape(1, 4, 4),
    "llava-1.5-7b-8th": Shape(8, 4, 3),
    "llava-1.5-7b-32nd": Shape(32, 1, 2),
    "qwen2.5-vl-7b": Shape(1, 28, 32, "qwen"),
    "qwen2.5-vl-7b-4l": Shape(1, 4, 4, "qwen"),
    "qwen2.5-vl-7b-28th": Shape(28, 2, 2, "qwen"),
}
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<image>")
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# Two special tokens instead of two bytes: both templates have the same length.
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("}}: ", "}}:", 1).replace("<image>\n", "".join(QWEN_TOKENS[:3]))
# Tokens (bytes) that the template adds to a question about one image.
_TEMPLATE_TOKENS = len("USER: \n ASSISTANT: ")


@dataclass(frozen=True)
class Lengths:
    """Lengths of the synthetic groups in tokens; an answer's last token is EOS.

    Attributes:
        image_tokens: Per image, one image per group; a square number, as the patches form a square.
        prompt_tokens: Per prompt, including the chat template, without image tokens.
        answer_tokens: Per completion.
        completions: Per group: one is preferred to all others, whose scores are equal (as in arXiv 2403.08730).
    """

    image_tokens: int = 576
    prompt_tokens: int = 44
    answer_tokens: int = 100
    completions: int = 2

    def __post_init__(self) -> None:
        if self.image_tokens < 1 or math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(f"--image-tokens is {self.image_tokens}; give a square number, as patches form a square")
        if self.prompt_tokens <= _TEMPLATE_TOKENS:
            raise ValueError(
                f"--prompt-tokens is {self.prompt_tokens}; the chat template takes {_TEMPLATE_TOKENS}, give more"
            )
        if self.answer_tokens < 8:
            raise ValueError(f"--answer-tokens is {self.answer_tokens}; give at least 8, so that answers differ")
        if self.completions < 2:
            raise ValueError(f"--completions is {self.completions}; a pair needs at least 2")

    def image_side_pixels(self, pixels_per_token: int = PATCH) -> int:
        return pixels_per_token * math.isqrt(self.image_tokens)


def byte_tokenizer(special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Any:
    """A byte-level tokenizer without merges: one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llava_config(shape: str, image_tokens: int, tokenizer: Any) -> Any:
    """The transformers config of a shape.

    Widths, depths and intermediate sizes of tower and language model are divided by n; attention heads keep their size.
    The vocabulary is divided by n^2. Tower, language model and LM head thus keep their shares of the matrix products;
    the share of attention, whose work is proportional to length times width, grows by n.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    n, layers = SHAPES[shape].divisor, SHAPES[shape].layers
    width, vision_width = 4096 // n, 1024 // n
    text = LlamaConfig(
        vocab_size=max(32064 // n**2, len(tokenizer)),
        hidden_size=width,
        intermediate_size=11008 // n,
        num_hidden_layers=layers,
        num_attention_heads=max(1, 32 // n),
        num_key_value_heads=max(1, 32 // n),
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        # Larger weights compensate for shorter rows, so that activations have the same scale as at width 4096.
        initializer_range=0.02 * math.sqrt(n),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=SHAPES[shape].vision_layers,
        num_attention_heads=max(1, 16 // n),
        image_size=PATCH * math.isqrt(image_tokens),
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=image_tokens,
        tie_word_embeddings=False,
    )


def qwen_config(shape: str, tokenizer: Any) -> Any:
    """The transformers config of a Qwen2.5-VL-7B shape, scaled as that of LLaVA; every head keeps its size."""
    from transformers import Qwen2_5_VLConfig

    n, size = SHAPES[shape].divisor, SHAPES[shape]
    start, image, end, video = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    text = {
        "vocab_size": max(152064 // n**2, len(tokenizer)),
        "hidden_size": 3584 // n,
        "intermediate_size": 18944 // n,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 28 // n,
        "num_key_value_heads": max(1, 4 // n),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "initializer_range": 0.02 * math.sqrt(n),
        "tie_word_embeddings": False,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": 80 * max(1, 16 // n),
        "intermediate_size": max(160, 3420 // n),
        "num_heads": max(1, 16 // n),
        "out_hidden_size": 3584 // n,
        "fullatt_block_indexes": list(range(7, size.vision_layers, 8)) or [size.vision_layers - 1],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )


def _llava_processor(tokenizer: Any, side: int) -> list[Any]:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return [
        LlavaProcessor(
            image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
    ]


def _qwen_processor(tokenizer: Any, side: int) -> list[Any]:
    """Saved in parts: the whole Qwen2_5_VLProcessor cannot be built without torchvision (its video part)."""
    from transformers import Qwen2VLImageProcessor

    tokenizer.chat_template = QWEN_TEMPLATE
    return [tokenizer, Qwen2VLImageProcessor(size={"shortest_edge": side**2, "longest_edge": side**2})]


def write_model(directory: Path, shape: str, image_tokens: int, dtype: torch.dtype, device: torch.device) -> Path:
    """Saves a random model of a shape and its processor for `from_pretrained`; returns `directory`.

    Raises:
        ValueError: The shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"--model {shape}: neither a directory nor a shape; the shapes are {', '.join(SHAPES)}")
    from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

    side = SHAPES[shape].pixels_per_token * math.isqrt(image_tokens)
    kind: Any
    if SHAPES[shape].family == "qwen":
        tokenizer = byte_tokenizer((*SPECIAL_TOKENS[:3], *QWEN_TOKENS))
        kind, config = Qwen2_5_VLForConditionalGeneration, qwen_config(shape, tokenizer)
        processor = _qwen_processor(tokenizer, side)
    else:
        tokenizer = byte_tokenizer()
        kind, config = LlavaForConditionalGeneration, llava_config(shape, image_tokens, tokenizer)
        processor = _llava_processor(tokenizer, side)
    torch.manual_seed(0)
    with device:  # 7 billion random numbers take minutes on CPU
        model = kind._from_config(config, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size="2GB")  # shards are hashed in parallel
    for part in processor:
        part.save_pretrained(directory)
    if device.type == "cuda":  # the providers' processes need the memory
        del model
        torch.cuda.empty_cache()
    return directory


def write_groups(
    directory: Path, lengths: Lengths, num_groups: int, num_images: int = 0, pixels_per_token: int = PATCH
) -> Path:
    """Writes `groups.jsonl` and its images to `directory`; returns the path of groups.jsonl.

    Every group has a different prompt and completions, made of random letters.

    Args:
        num_images: Different images, taken in turn; 0 gives each group its own.
        pixels_per_token: See `Shape`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    pixels = np.random.default_rng(0)
    side = lengths.image_side_pixels(pixels_per_token)

    def letters(count: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=count))

    with (directory / "groups.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            name = f"{number % (num_images or num_groups)}.png"
            if not (directory / name).exists():
                Image.fromarray(pixels.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(directory / name)
            question = letters(lengths.prompt_tokens - _TEMPLATE_TOKENS)
            group = {
                "id": str(number),
                "images": [name],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                "completions": [
                    {
                        "response": letters(lengths.answer_tokens - 1),
                        "score": int(k == 0),
                        "type": "mllm-hal" if k else "gt",
                    }
                    for k in range(lengths.completions)
                ],
            }
            file.write(json.dumps(group) + "\n")
    return directory / "groups.jsonl"
