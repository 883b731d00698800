"""Biased views of a prompt: the image is removed, replaced by unknown tokens, or noised (arXiv 2403.05262, 2311.16922).

What the model answers under them is its language prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bpo.config.decoding import BiasedView, ContrastConfig
from bpo.data.encode import EncodedImages, EncodedPrompt
from bpo.data.noise import diffuse_images
from bpo.data.views import without_images
from bpo.job.seeds import derive_seed

if TYPE_CHECKING:
    from bpo.data.encode import Encoder

# Diffusion steps of the released code of VCD and VDD.
VCD_STEP, VDD_STEP = 500, 999


def biased_prompts(
    encoder: Encoder, prompts: Sequence[EncodedPrompt], options: ContrastConfig, *, vcd: bool, seeds: Sequence[int]
) -> dict[str, list[EncodedPrompt]]:
    """The prompts under each view of `options.views`, or the method's own; a prompt without an image stays as it is.

    Args:
        prompts: From `Encoder.encode_prompt`.
        vcd: Whether the method is vcd, which has other defaults.
        seeds: One per prompt, for its noise.

    Raises:
        ValueError: The view is `unk`, but the tokenizer has no unknown token.
    """
    step = options.noise_step or (VCD_STEP if vcd else VDD_STEP)
    views: Sequence[BiasedView] = options.views or (["noise"] if vcd else ["none"])
    return {
        view: [_biased(encoder, prompt, view, step, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for view in views
    }


def _biased(encoder: Encoder, prompt: EncodedPrompt, view: BiasedView, step: int, seed: int) -> EncodedPrompt:
    if not prompt.image_inputs:
        return prompt
    if view == "none":
        return encoder.encode_prompt(prompt.record_id, (), without_images(prompt.turns))
    if view == "noise":
        generator = torch.Generator().manual_seed(derive_seed(seed, "noise"))
        noised = diffuse_images(EncodedImages(prompt.image_inputs, ()), encoder.family, step, generator)
        return replace(prompt, image_inputs=noised.inputs)
    unknown = encoder.tokenizer.unk_token_id
    if unknown is None:
        raise ValueError(
            "evaluation.contrast.views has unk, but the model's tokenizer has no unknown token; use none or noise"
        )
    ids = tuple(unknown if token == encoder.image_token_id else token for token in prompt.prefix_ids)
    return replace(prompt, prefix_ids=ids, image_inputs={})
