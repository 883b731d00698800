"""Answers of a model to one batch of prompts, decoded as `evaluation.decoding` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bpo.config.evaluation import EvaluationConfig
from bpo.model.decoding.biased import biased_prompts
from bpo.model.decoding.calibration import Labels, calibrated_answers
from bpo.model.decoding.contrast import contrast_answers
from bpo.model.decoding.cost import DecodingCost
from bpo.model.generate import generate_answers

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


def answer_prompts(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    *,
    labels: Sequence[Labels],
    options: EvaluationConfig,
    max_new_tokens: int,
    seeds: Sequence[int],
    cost: DecodingCost | None = None,
    priors: Mapping[Labels, Sequence[float]] | None = None,
) -> list[str]:
    """The model's answers to one batch, control and placeholder tokens suppressed.

    An answer depends only on its prompt, its seed and the options, not on the rest of the batch (see
    `generate_answers`). `calibration` decodes prompts without labels or without an image plainly.

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        prompts: One batch, from `Encoder.encode_prompt`.
        labels: For each prompt the answers to choose from, or an empty tuple.
        options: `decoding` and its sections; a `grid` is run as one plain decoding per setting.
        max_new_tokens: Longest answer.
        seeds: One per prompt, for its sample and the noise of its image.
        cost: Adds the forward passes.
        priors: For calibration over the data set, labels -> their mean biased probabilities.

    Raises:
        ValueError: The view `unk` needs an unknown token; two labels begin with the same token.
    """
    cost = DecodingCost() if cost is None else cost
    if options.decoding in ("vdd", "vcd") and prompts:
        return contrast_answers(
            model,
            encoder,
            prompts,
            biased_prompts(encoder, prompts, options.contrast, vcd=options.decoding == "vcd", seeds=seeds),
            options,
            max_new_tokens=max_new_tokens,
            seeds=seeds,
            cost=cost,
        )
    answers: dict[int, str] = {}
    if options.decoding == "calibration":
        answers = calibrated_answers(model, encoder, prompts, labels, options, seeds, cost, priors)
    others = [n for n in range(len(prompts)) if n not in answers]
    with cost.counting(model):
        texts = generate_answers(
            model,
            encoder,
            [prompts[n] for n in others],
            max_new_tokens=max_new_tokens,
            temperature=options.sampling.temperature,
            top_p=options.sampling.top_p,
            top_k=options.sampling.top_k,
            num_beams=options.sampling.num_beams,
            seeds=[seeds[n] for n in others],
        )
    answers |= dict(zip(others, texts, strict=True))
    return [answers[n] for n in range(len(prompts))]
