"""What a loss of a pair is computed from.

Notation: log pi(y) = sum_t w_t log pi(y_t) over the tokens of y, divided by sum_t w_t if the term's length is `mean`;
h(y) = log pi(y) - log pi_ref(y); y_w preferred, y_l dispreferred; beta per pair.
Shape letter: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class PairValues:
    """Inputs of a loss, one entry per pair, in fp32. A side that is an anchor is 0 in every field.

    chosen_logp_P, rejected_logp_P: log pi(y_w) and log pi(y_l), with gradient.
    chosen_reference_P, rejected_reference_P: the same of the reference; 0 for a loss without a reference.
    chosen_nll_P: mean over the tokens of -log pi(y_w), with gradient.
    chosen_tokens_P, rejected_tokens_P: number of tokens.
    beta_P: inverse temperature.
    label_smoothing, divergence, divergence_alpha: of the term.
    options: the loss's own options, with defaults.
    state: of a stateful loss: what earlier steps have left, to be read only.
    similarity_PP: for losses across groups: cosine of the prompts' embeddings.
    extrapolated_P: `delta_P` of log-probs extrapolated beyond the policy, without gradient, for a loss that
        `extrapolates`; None if its option `extrapolation` is 0.
    """

    chosen_logp_P: torch.Tensor
    rejected_logp_P: torch.Tensor
    chosen_reference_P: torch.Tensor
    rejected_reference_P: torch.Tensor
    chosen_nll_P: torch.Tensor
    chosen_tokens_P: torch.Tensor
    rejected_tokens_P: torch.Tensor
    beta_P: torch.Tensor
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None
    similarity_PP: torch.Tensor | None = None
    extrapolated_P: torch.Tensor | None = None

    @property
    def chosen_ratio_P(self) -> torch.Tensor:
        """h(y_w)."""
        return self.chosen_logp_P - self.chosen_reference_P

    @property
    def rejected_ratio_P(self) -> torch.Tensor:
        """h(y_l)."""
        return self.rejected_logp_P - self.rejected_reference_P

    @property
    def margin_P(self) -> torch.Tensor:
        """h(y_w) - h(y_l), or the difference of rewards of another divergence from the reference (arXiv 2309.16240).

        With u = pi / pi_ref of a side, the reward is f'(u) without constants: log u for the reverse KL divergence,
        -1/u for the forward one, log u - log(1 + u) for the Jensen-Shannon one, (1 - u^-alpha) / alpha for alpha.
        """
        chosen_P, rejected_P = self.chosen_ratio_P, self.rejected_ratio_P
        if self.divergence == "js":
            return logsigmoid(chosen_P) - logsigmoid(rejected_P)
        if self.divergence in ("alpha", "forward_kl"):
            alpha = 1.0 if self.divergence == "forward_kl" else self.divergence_alpha
            return power_reward(chosen_P, alpha) - power_reward(rejected_P, alpha)
        return chosen_P - rejected_P

    @property
    def delta_P(self) -> torch.Tensor:
        """beta times the margin."""
        return self.beta_P * self.margin_P


def power_reward(ratio_P: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - u^-alpha) / alpha of log u, at least minus a 10,000th of the largest number of its dtype.

    By expm1, so that it approaches log u for small alpha instead of cancelling. The bound keeps the difference of two
    rewards, and its product with beta, finite: a pair far from the reference must not become NaN.
    """
    limit = math.log(torch.finfo(ratio_P.dtype).max) + min(0.0, math.log(alpha)) - math.log(10_000)
    return -torch.expm1(torch.clamp(-alpha * ratio_P, max=limit)) / alpha
