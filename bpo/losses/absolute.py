"""Losses of each side by itself, not of their difference: they also say whether log pi(y_w) should rise.

Notation of `values.py`; r = beta h, the implicit reward; ls = log sigmoid.
Shape letter: P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bpo.losses.options import require_reverse_kl
from bpo.losses.registry import register_loss
from bpo.losses.values import PairValues


def rewards(values: PairValues, name: str) -> tuple[Tensor, Tensor]:
    """r(y_w) and r(y_l), each [P]. Raises ValueError for the loss `name` if the divergence is not `reverse_kl`."""
    require_reverse_kl(values, name)
    return values.beta_P * values.chosen_ratio_P, values.beta_P * values.rejected_ratio_P


@register_loss("nca_pair")
def nca_pair(values: PairValues) -> Tensor:
    """-ls(r_w) - ls(-r_w) / 2 - ls(-r_l) / 2: NCA for pairs, arXiv 2402.05369."""
    chosen_P, rejected_P = rewards(values, "nca_pair")
    return -logsigmoid(chosen_P) - 0.5 * (logsigmoid(-chosen_P) + logsigmoid(-rejected_P))


@register_loss("sppo_hard")
def sppo_hard(values: PairValues) -> Tensor:
    """(h(y_w) - 1/(2 beta))^2 + (h(y_l) + 1/(2 beta))^2: SPPO, arXiv 2405.00675 eq. 4.7, with win rates of 1 and 0."""
    require_reverse_kl(values, "sppo_hard")
    target_P = 1 / (2 * values.beta_P)
    return (values.chosen_ratio_P - target_P).square() + (values.rejected_ratio_P + target_P).square()


@register_loss("apo_zero")
def apo_zero(values: PairValues) -> Tensor:
    """sigmoid(-r_w) + sigmoid(r_l): APO-zero, arXiv 2408.06266 eq. 7, if the preferred answers beat the model's own."""
    chosen_P, rejected_P = rewards(values, "apo_zero")
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


@register_loss("apo_down")
def apo_down(values: PairValues) -> Tensor:
    """sigmoid(r_w) + sigmoid(r_l - r_w): APO-down, arXiv 2408.06266 eq. 8, if the model's own beat the preferred."""
    chosen_P, rejected_P = rewards(values, "apo_down")
    return torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P)


@register_loss("nll", reference=False, pairs="chosen")
@register_loss("sft", reference=False, pairs="chosen")
def sft(values: PairValues) -> Tensor:
    """Mean over the tokens of -log pi(y_w,t): fine-tuning on the preferred side, the control in BPO's Table 4."""
    return values.chosen_nll_P


@register_loss("log_ratio", pairs="chosen")
def log_ratio(values: PairValues) -> Tensor:
    """r(y_w), to be minimised: SELM's optimism term, arXiv 2405.19332; the term's weight is its alpha.

    With `sigmoid`, L = L_DPO + alpha beta h(y). SELM's y is the answer of the reference itself: `pairs: explored`. By
    default it is the preferred answer. Without a lower bound.
    """
    return rewards(values, "log_ratio")[0]
