"""Options of the loss: a type, or a list of weighted terms over pairs of cells, and the views that they need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bpo.config.options import Section, needed, number


@dataclass(kw_only=True)
class ViewConfig(Section):
    """A changed image under which completions are scored. Made from the seed and the record alone.

    Attributes:
        type: `noise`, `crop`, `mask`, `other` (the record's other_images), `none` (no image), or a plug-in's.
        step: Diffusion step of `noise`.
        space: Space of `noise`: the `normalised` pixels that the model sees, or the picture's own `pixel` values, whose
            noise is weaker where the image processor scales the picture down.
        min_area: Smallest area of `crop`, as a fraction of the image's.
        max_area: Largest area of `crop`.
        share: Share of the image that `mask` covers.
        options: Options of a plug-in's view.
    """

    where = "loss.views"

    type: str = needed("noise")
    step: int = number(500, at_least=0, at_most=999)
    space: Literal["normalised", "pixel"] = "normalised"
    min_area: float = number(0.01, above=0, at_most=1)
    max_area: float = number(0.2, above=0, at_most=1)
    share: float = number(0.3, above=0, at_most=1)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TermConfig(Section):
    """One term of a loss.

    Attributes:
        type: Loss of a pair (docs/methods.md), or a plug-in's.
        name: Name in the logs; empty uses the type.
        weight: Factor of the term.
        beta: Inverse temperature; 0 uses loss.beta.
        label_smoothing: Assumed fraction of pairs with swapped labels.
        pairs: Rule that selects the pairs: `text`, `image`, `chosen`, `rejected`, `other`, `auxiliary`, `explored`,
            `symmetric`, `argmax`, or a plug-in's; empty uses the loss's own.
        on: Answers that a likelihood term is on: `chosen` or `auxiliary`; short for its `pairs`.
        view: Name in loss.views of the image of both sides; empty is the clean image.
        against: Name in loss.views of the image of the dispreferred side, for `image` and `argmax` pairs.
        length: Whether a sequence counts as the `sum` or the `mean` of its tokens; `auto` is the loss's own choice.
        token_weights: Rule that weighs tokens: `data`, `changed`, or a plug-in's; empty weighs them equally.
        ld_alpha: Weight of the tokens beyond the shorter side's length (LD-DPO).
        weighting: Rule that weighs pairs: `wpo`, or a plug-in's; empty weighs them as the data do.
        divergence: Divergence from the reference whose reward is used.
        divergence_alpha: Order of the `alpha` divergence.
        guidance: Weight g of the image in the policy's log-probs, g log p(y|view) - (g - 1) log p(y|guidance_view).
        guidance_view: Name in loss.views of the other image of `guidance`.
        shared_tokens: For `argmax` pairs, whether the policy is scored on the reference's tokens instead of its own.
        options: Options of the loss and its rules.
    """

    where = "loss.terms"

    type: str = needed("sigmoid")
    name: str = ""
    weight: float = number(1.0, at_least=0)
    beta: float = number(0.0, above=0, zero="loss.beta")
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    pairs: str = ""
    on: Literal["", "chosen", "auxiliary"] = ""
    view: str = ""
    against: str = ""
    length: Literal["auto", "sum", "mean"] = "auto"
    token_weights: str = ""
    ld_alpha: float = number(1.0, at_least=0, at_most=1)
    weighting: str = ""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    divergence_alpha: float = number(0.5, above=0)
    guidance: float = number(1.0, at_least=1)
    guidance_view: str = ""
    shared_tokens: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class LossConfig(Section):
    """Preference loss: `type` for one term, or `terms` for a weighted list.

    Attributes:
        type: Loss of a pair: sigmoid (DPO), ipo, hinge, sft (chosen completions only, as a control), and the others of
            docs/methods.md.
        beta: Inverse temperature of the implicit reward, unless a term has its own.
        label_smoothing: Assumed fraction of pairs with swapped labels.
        chosen_nll_weight: Weight of the mean negative log-likelihood per token of the chosen completions.
        options: Options of the loss `type`.
        terms: List of terms instead of `type`, `label_smoothing`, `chosen_nll_weight` and `options`.
        views: Changed images by name, for the terms that score completions under them.
        prompt_embedding: Embedding of prompts for losses across groups: `model` (mean of the prompt's input embeddings
            and of the image's features), or the directory of a sentence encoder, joined with the image's features.
        plugin: Python file, or installed entry point of the group bpo.losses, that registers losses, views and rules.
    """

    where = "loss"

    type: str = needed("sigmoid")
    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    chosen_nll_weight: float = number(0.0, at_least=0)
    options: dict[str, Any] = field(default_factory=dict)
    terms: list[TermConfig] = field(default_factory=list)
    views: dict[str, ViewConfig] = field(default_factory=dict)
    prompt_embedding: str = needed("model")
    plugin: str = ""
