"""Answers of a model to one batch of prompts, decoded as `evaluation.decoding` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bpo.config.evaluation import EvaluationConfig
from bpo.model.decoding.cost import DecodingCost
from bpo.model.generate import generate_answers

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


def answer_prompts(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    *,
    labels: Sequence[tuple[str, ...]],
    options: EvaluationConfig,
    max_new_tokens: int,
    seeds: Sequence[int],
    cost: DecodingCost | None = None,
) -> list[str]:
    """The model's answers to one batch, control and placeholder tokens suppressed.

    An answer depends only on its prompt, its seed and the options, not on the rest of the batch (see
    `generate_answers`).

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        prompts: One batch, from `Encoder.encode_prompt`.
        labels: For each prompt the answers to choose from, or an empty tuple.
        max_new_tokens: Longest answer.
        seeds: One per prompt.
        cost: Adds the forward passes.

    Raises:
        ValueError: The options contradict each other.
    """
    sampling = options.sampling
    cost = DecodingCost() if cost is None else cost
    with cost.counting(model):
        return generate_answers(
            model,
            encoder,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            num_beams=sampling.num_beams,
            seeds=seeds,
        )
