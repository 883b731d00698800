"""Synthetic benchmark inputs: LLaVA-1.5-7B at full or reduced size with random weights; groups of exact lengths."""

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

# Shape name -> divisor of every width and depth of LLaVA-1.5-7B.
SHAPES = {"llava-1.5-7b": 1, "llava-1.5-7b-8th": 8, "llava-1.5-7b-32nd": 32}
PATCH = 14
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
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

    @property
    def image_side_pixels(self) -> int:
        return PATCH * math.isqrt(self.image_tokens)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges: one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llava_config(shape: str, image_tokens: int, tokenizer: Any) -> Any:
    """The transformers config of a shape.

    Widths, depths and intermediate sizes of tower and language model are divided by n; attention heads keep their size.
    The vocabulary is divided by n^2. Tower, language model and LM head thus keep their shares of the matrix products;
    the share of attention, whose work is proportional to length times width, grows by n.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    n = SHAPES[shape]
    width, vision_width = 4096 // n, 1024 // n
    text = LlamaConfig(
        vocab_size=max(32064 // n**2, len(tokenizer)),
        hidden_size=width,
        intermediate_size=11008 // n,
        num_hidden_layers=32 // n,
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
        num_hidden_layers=max(2, 24 // n),
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


def write_model(directory: Path, shape: str, image_tokens: int, dtype: torch.dtype, device: torch.device) -> Path:
    """Saves a random model of a shape and its processor for `from_pretrained`; returns `directory`.

    Raises:
        ValueError: The shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"--model {shape}: neither a directory nor a shape; the shapes are {', '.join(SHAPES)}")
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = byte_tokenizer()
    config = llava_config(shape, image_tokens, tokenizer)
    side = config.vision_config.image_size
    torch.manual_seed(0)
    with device:  # 7 billion random numbers take minutes on CPU
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    if device.type == "cuda":  # the providers' processes need the memory
        del model
        torch.cuda.empty_cache()
    return directory


def write_groups(directory: Path, lengths: Lengths, num_groups: int) -> Path:
    """Writes `groups.jsonl` and its images to `directory`; returns the path of groups.jsonl.

    Every group has a different image, prompt and completions, made of random letters.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    pixels = np.random.default_rng(0)
    side = lengths.image_side_pixels

    def letters(count: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=count))

    with (directory / "groups.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            name = f"{number}.png"
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
