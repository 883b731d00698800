"""Time that a worker process takes to pack a micro-batch of 8,192 tokens, without images and with their pixels.

    python -m benchmarks.collate [--tokens 8192] [--samples 200] [--json FILE]

Groups of three completions with one image of 576 tokens each, tokenized beforehand; LLaVA-1.5 (positions in one
channel) and Qwen2.5-VL (in three). A run always concatenates the images' pixels; without them is what packing takes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import machine_of_run
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, EncodedPrompt
from bpo.data.families import Family, family_of
from bpo.tools.bench.synthetic import QWEN_TOKENS, SPECIAL_TOKENS, byte_tokenizer, llava_config, qwen_config

IMAGE_TOKENS, PROMPT_TOKENS, COMPLETIONS = 576, 64, 3
SIDE, GRID = 336, (1, 48, 48)  # pixels of LLaVA's images; patches of Qwen's, four of which become a token
TARGET_MS = 3.0


def families() -> dict[str, Family]:
    """The families by model, from configs of their full shapes."""
    qwen = qwen_config("qwen2.5-vl-7b-4l", byte_tokenizer((*SPECIAL_TOKENS, *QWEN_TOKENS)))
    llava = llava_config("llava-1.5-7b", IMAGE_TOKENS, byte_tokenizer())
    return {"llava-1.5-7b": family_of(llava), "qwen2.5-vl-7b": family_of(qwen)}


def image_inputs(family: Family, *, with_pixels: bool) -> dict[str, torch.Tensor]:
    """Those of one image; without pixels, those of one patch stand for all of them."""
    if "qwen" in family.config.model_type:
        patches = GRID[1] * GRID[2] if with_pixels else 1
        return {"pixel_values": torch.zeros(patches, 1176), "image_grid_thw": torch.tensor([GRID])}
    side = SIDE if with_pixels else family.config.vision_config.patch_size
    return {"pixel_values": torch.zeros(1, 3, side, side)}


def group(family: Family, number: int, rng: random.Random, *, with_pixels: bool) -> EncodedGroup:
    """A tokenized group with answers of 60 to 140 tokens."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(10, 200), k=count))

    before = PROMPT_TOKENS // 4
    prefix = tokens(before) + (family.image_token_id,) * IMAGE_TOKENS + tokens(PROMPT_TOKENS - before)
    inputs = image_inputs(family, with_pixels=with_pixels)
    answers = tuple(tokens(rng.randint(60, 140)) for _ in range(COMPLETIONS))
    return EncodedGroup(EncodedPrompt(str(number), prefix, inputs), answers, (1.0, *(0.0,) * (COMPLETIONS - 1)))


def micro_batch(family: Family, tokens: int, *, with_pixels: bool) -> list[EncodedGroup]:
    """Groups of at most `tokens` in all."""
    rng, groups = random.Random(0), list[EncodedGroup]()
    while True:
        groups.append(group(family, len(groups), rng, with_pixels=with_pixels))
        if sum(one.num_tokens for one in groups) > tokens:
            return groups[:-1]


def sample(family: Family, groups: list[EncodedGroup], samples: int) -> dict[str, float]:
    """Milliseconds of `collate_groups`: least and median."""
    times_ms = []
    for _ in range(samples):
        # A worker sees every group for the first time: nothing may be kept from the run before.
        fresh = [replace(one, prompt=replace(one.prompt)) for one in groups]
        begin = time.perf_counter()
        collate_groups(fresh, family)
        times_ms.append(1e3 * (time.perf_counter() - begin))
    return {"least_ms": min(times_ms), "median_ms": statistics.median(times_ms)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine_of_run(), "target_ms": TARGET_MS, "rows": []}
    print(f"{'model':16}{'pixels':>8}{'groups':>8}{'tokens':>8}{'least ms':>10}{'median ms':>11}")
    for name, family in families().items():
        for with_pixels in (False, True):
            groups = micro_batch(family, options.tokens, with_pixels=with_pixels)
            row = {"model": name, "pixels": with_pixels, "groups": len(groups)}
            row |= {"tokens": sum(one.num_tokens for one in groups)} | sample(family, groups, options.samples)
            report["rows"].append(row)
            print(
                f"{name:16}{'yes' if with_pixels else 'no':>8}{row['groups']:8}{row['tokens']:8}"
                f"{row['least_ms']:10.2f}{row['median_ms']:11.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
