"""The weakened image: the model answers it, and its language prior speaks.

The answer comes from the noised image *alone*. Contrasting clean and noised logits, as visual contrastive decoding
does, moves the answer away from the prior: the opposite of what is wanted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bpo.bootstrap.noise import diffuse
from bpo.bootstrap.seeds import derive_seed
from bpo.config_bootstrap import WeakenConfig
from bpo.data.encode import EncodedPrompt, Encoder
from bpo.data.families import Family
from bpo.model.generate import generate_answers

NO_NOISE = -1


def weaken_prompt(prompt: EncodedPrompt, family: Family, noise_step: int, seed: int) -> EncodedPrompt:
    """The same prompt with its images noised to `noise_step`; unchanged for step -1 or without images.

    The noise is drawn on the CPU from a generator of `seed` alone, so every device weakens an image alike.
    """
    if noise_step == NO_NOISE or not prompt.image_inputs:
        return prompt
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise"))
    pixels = prompt.image_inputs["pixel_values"].float()
    noised = diffuse(pixels, noise_step, family.noise_like(pixels, generator))
    return replace(prompt, image_inputs={**prompt.image_inputs, "pixel_values": noised})


def answer_weakened(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    options: WeakenConfig,
    noise_step: int,
    seeds: Sequence[int],
) -> list[str]:
    """Answers to one batch of prompts whose images are noised to `noise_step` (-1: the clean images).

    Args:
        seeds: One a record; decides its noise and its sampling.
    """
    weakened = [
        weaken_prompt(prompt, encoder.family, noise_step, seed) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return generate_answers(
        model,
        encoder,
        weakened,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seeds=seeds,
    )
