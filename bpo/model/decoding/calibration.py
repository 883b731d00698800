"""Post-hoc calibration of the probabilities of label tokens by those under a biased view (arXiv 2403.05262).

    scale: q = W p, W = diag(p_biased)^-1, normalised        shift: q = p - p_biased

p and p_biased are normalised over the labels. The answer is the label with the largest q, the first one of a tie.

Shape letters: B sequences, L labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bpo.config.decoding import ContrastConfig
from bpo.config.evaluation import EvaluationConfig
from bpo.model.decoding.biased import biased_prompts
from bpo.model.decoding.branch import Branch
from bpo.model.decoding.cost import IMAGE, DecodingCost
from bpo.model.generate import without_gradients

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder

# Added to biased probabilities, as in the released code: a label that the prior excludes must not decide alone.
SMOOTHING = 1e-4

Labels = tuple[str, ...]
Form = Literal["scale", "shift"]


def calibrated(p: Sequence[float], p_biased: Sequence[float], form: Form) -> list[float]:
    """q of each label [L]: sums to 1 for `scale`, to the difference of the sums for `shift`."""
    if form == "shift":
        return [own - biased for own, biased in zip(p, p_biased, strict=True)]
    scaled = [own / biased for own, biased in zip(p, p_biased, strict=True)]
    return [value / sum(scaled) for value in scaled]


def best_label(labels: Labels, scores: Sequence[float]) -> str:
    """The label with the largest score, the first one of a tie."""
    return labels[max(range(len(labels)), key=lambda number: scores[number])]


def label_tokens(encoder: Encoder, labels: Labels) -> list[int]:
    """The first token of each label [L] as the start of an answer.

    Raises:
        ValueError: Two labels begin with the same token.
    """
    tokens = [encoder.encode_completion(label)[0] for label in labels]
    if len(set(tokens)) < len(tokens):
        raise ValueError(
            f"evaluation.decoding=calibration compares the first tokens of the labels {', '.join(labels)}, and two are "
            "equal in the model's tokenizer; use another decoding"
        )
    return tokens


def label_probabilities(
    model: Any,
    encoder: Encoder,
    view: str,
    prompts: Sequence[EncodedPrompt],
    labels: Sequence[Labels],
    cost: DecodingCost,
) -> list[list[float]]:
    """For each of B prompts the probabilities of its labels [L] as the first token, normalised over them."""
    tokens = [label_tokens(encoder, own) for own in labels]
    with without_gradients(model):
        logits_BV = Branch(view, model, encoder, prompts, cost).prefill()
        return [logits_V[of_labels].softmax(-1).tolist() for logits_V, of_labels in zip(logits_BV, tokens, strict=True)]


def biased_probabilities(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    labels: Sequence[Labels],
    contrast: ContrastConfig,
    seeds: Sequence[int],
    cost: DecodingCost,
) -> list[list[float]]:
    """`label_probabilities` under biased views, averaged over them, plus `SMOOTHING`.

    Args:
        contrast: Its `views` and `noise_step`.
        seeds: One per prompt, for the noise of its image.
    """
    biased = biased_prompts(encoder, prompts, contrast, vcd=False, seeds=seeds)
    of_views = [label_probabilities(model, encoder, view, changed, labels, cost) for view, changed in biased.items()]
    return [
        [sum(of_label) / len(of_views) + SMOOTHING for of_label in zip(*of_prompt, strict=True)]
        for of_prompt in zip(*of_views, strict=True)
    ]


def calibrated_answers(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    labels: Sequence[Labels],
    options: EvaluationConfig,
    seeds: Sequence[int],
    cost: DecodingCost,
    priors: Mapping[Labels, Sequence[float]] | None,
) -> dict[int, str]:
    """Number of the prompt -> its best label, for those with labels and an image; arguments as in `answer_prompts`."""
    rows = [n for n, (prompt, own) in enumerate(zip(prompts, labels, strict=True)) if own and prompt.image_inputs]
    cost.calibrated += len(rows)
    cost.uncalibrated += len(prompts) - len(rows)
    if not rows:
        return {}
    prompts, labels, seeds = [prompts[n] for n in rows], [labels[n] for n in rows], [seeds[n] for n in rows]
    if options.calibration.over == "sample":
        biased = biased_probabilities(model, encoder, prompts, labels, options.contrast, seeds, cost)
    else:
        assert priors is not None, "calibration over the data set needs its mean biased probabilities"
        biased = [list(priors[own]) for own in labels]
    seen = label_probabilities(model, encoder, IMAGE, prompts, labels, cost)
    return {
        n: best_label(own, calibrated(p, p_biased, options.calibration.form))
        for n, own, p, p_biased in zip(rows, labels, seen, biased, strict=True)
    }
