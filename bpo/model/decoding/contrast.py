"""Contrast with the language prior: visual debiased decoding (arXiv 2403.05262) and visual contrastive decoding
(arXiv 2311.16922).

    z = (1 + alpha) z_image - alpha z_biased, only for tokens v with p_image[v] >= beta max p_image

`z_biased` is the mean over the biased views. Temperature, nucleus and the choice of a token follow.

Shape letters: B sequences, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bpo.config.evaluation import EvaluationConfig
from bpo.model.decoding.branch import Branch
from bpo.model.decoding.cost import IMAGE, DecodingCost
from bpo.model.generate import logits_processors, until_end, without_gradients

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


def contrasted(
    image_BV: torch.Tensor, biased_BV: torch.Tensor, alpha: float, beta: float, suppressed: Sequence[int] = ()
) -> torch.Tensor:
    """The scores [B, V] from which a token is chosen; -inf where it is excluded.

    Args:
        image_BV, biased_BV: Logits under the true image and under the biased view.
        suppressed: Tokens that are never chosen; they do not count as the most probable one.
    """
    image_BV = image_BV.index_fill(-1, torch.tensor([*suppressed], dtype=torch.long, device=image_BV.device), -math.inf)
    scores_BV = (1 + alpha) * image_BV - alpha * biased_BV
    if beta == 0:
        return scores_BV
    least_B1 = image_BV.amax(-1, keepdim=True) + math.log(beta)
    return scores_BV.masked_fill(image_BV < least_B1, -math.inf)


def contrast_answers(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    biased: Mapping[str, Sequence[EncodedPrompt]],
    options: EvaluationConfig,
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    cost: DecodingCost,
) -> list[str]:
    """Answers to one batch, as `generate_answers` gives them for alpha and beta 0.

    Args:
        biased: View -> the prompts under it; at least one view.
        options: `contrast` and `sampling`.
        seeds: One per prompt, for its sample.
    """
    branches = [Branch(IMAGE, model, encoder, prompts, cost)]
    branches += [Branch(view, model, encoder, changed, cost) for view, changed in biased.items()]
    sampling, contrast = options.sampling, options.contrast
    suppressed, end_ids = encoder.suppressed_token_ids, torch.tensor(encoder.end_token_ids, device=model.device)
    choose = logits_processors(suppressed, sampling.temperature, sampling.top_p, sampling.top_k, seeds, model.device)
    new_BN = torch.empty(len(prompts), 0, dtype=torch.long, device=model.device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    with without_gradients(model):
        logits = [branch.prefill() for branch in branches]
        while True:
            biased_BV = torch.stack(logits[1:]).mean(0)
            scores_BV = contrasted(logits[0], biased_BV, contrast.alpha, contrast.beta, suppressed)
            token_B = choose(new_BN, scores_BV).argmax(-1).masked_fill(ended_B, encoder.pad_token_id)
            new_BN = torch.cat([new_BN, token_B[:, None]], dim=1)
            ended_B |= torch.isin(token_B, end_ids)
            if ended_B.all() or new_BN.shape[1] == max_new_tokens:
                break
            logits = [branch.step(token_B) for branch in branches]
    return [encoder.decode(until_end(ids, set(encoder.end_token_ids), max_new_tokens)[0]) for ids in new_BN.tolist()]
