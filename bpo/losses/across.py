"""Losses that couple pairs of different prompts: they receive all pairs of a step, of all ranks, at once.

Notation of `values.py`; beta_i of pair i; e = label_smoothing; ls = log sigmoid. All are defined for the reverse KL
divergence only: another one's rewards of different prompts differ by an unknown constant.
Shape letter: P pairs; a matrix is [P, P], row i for y_w of pair i and column j for y_l of pair j.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bpo.losses.options import number_option, require_reverse_kl
from bpo.losses.preference import smoothed_logistic
from bpo.losses.registry import register_loss
from bpo.losses.values import PairValues


@register_loss("aot", across_groups=True, smoothing=True)
def aot(values: PairValues) -> Tensor:
    """-(1 - e) ls(beta d_i) - e ls(-beta d_i), d_i = u_(i) - v_(i): paired AOT, arXiv 2406.05882.

    u = log pi(y_w) - log pi(y_l) and v, the same of the reference, each sorted over the pairs: every quantile of the
    policy's preferences should exceed that of the reference's. The result is in the order of the pairs whose u it is,
    so that weights of pairs apply.
    """
    require_reverse_kl(values, "aot")
    policy_P = values.chosen_logp_P - values.rejected_logp_P
    return _matched_quantiles(policy_P, values.chosen_reference_P - values.rejected_reference_P, values)


@register_loss("aot_unpaired", across_groups=True, smoothing=True)
def aot_unpaired(values: PairValues) -> Tensor:
    """`aot` with u = h(y_w) and v = h(y_l): unpaired AOT, arXiv 2406.05882. In the order of the pairs of y_w."""
    require_reverse_kl(values, "aot_unpaired")
    return _matched_quantiles(values.chosen_ratio_P, values.rejected_ratio_P, values)


def _matched_quantiles(upper_P: Tensor, lower_P: Tensor, values: PairValues) -> Tensor:
    order_P = torch.argsort(upper_P.detach(), stable=True)
    rank_P = torch.argsort(order_P)
    lower_sorted_P = torch.sort(lower_P, stable=True).values
    return smoothed_logistic(values.beta_P * (upper_P - lower_sorted_P[rank_P]), values.label_smoothing)


def _contrasts(values: PairValues, name: str) -> Tensor:
    """beta_i (h(y_w,i) - h(y_l,j)), [P, P]."""
    require_reverse_kl(values, name)
    return values.beta_P[:, None] * (values.chosen_ratio_P[:, None] - values.rejected_ratio_P[None, :])


@register_loss("rpo", across_groups=True, needs_similarity=True, options={"tau": 0.5})
def rpo(values: PairValues) -> Tensor:
    """mean_j -ls(beta_i w_ij A_ij), A_ij = h(y_w,i) - h(y_l,j): RPO for pairs, arXiv 2402.10958.

    w_ij = softmax_j(-(1 - cos_ij) / tau) over the cosines of the prompts' embeddings: an answer is compared with those
    to other prompts too, mostly to similar ones. The weight is inside the sigmoid, as in the paper. The mean over the
    pairs is the paper's mean over the matrix; a single pair has w = 1, which is DPO.

    Raises:
        ValueError: tau is not above 0.
    """
    tau = number_option(values.options, "tau", above=0)
    assert values.similarity_PP is not None
    contrast_PP = _contrasts(values, "rpo")
    similarity_PP = values.similarity_PP.to(contrast_PP)
    if not len(contrast_PP):
        return contrast_PP.sum(1)
    # Relative to the row's largest before the division, so that no tau overflows.
    weight_PP = torch.softmax((similarity_PP - similarity_PP.amax(1, keepdim=True)) / tau, dim=1)
    return -logsigmoid(weight_PP * contrast_PP).mean(1)


@register_loss("rpo_diagonal", across_groups=True, options={"diagonal_weight": 0.8})
def rpo_diagonal(values: PairValues) -> Tensor:
    """d L_ii + (1 - d) mean_{j != i} L_ij, L_ij = -ls(beta_i (h(y_w,i) - h(y_l,j))), d = diagonal_weight.

    RPO with emphasis on the diagonal, arXiv 2402.10958, which needs no embeddings. A single pair has no other column:
    its loss is L_ii, which is DPO.

    Raises:
        ValueError: diagonal_weight is not in [0, 1].
    """
    weight = number_option(values.options, "diagonal_weight", at_least=0, at_most=1)
    loss_PP = -logsigmoid(_contrasts(values, "rpo_diagonal"))
    num_pairs = len(loss_PP)
    if num_pairs < 2:
        return loss_PP.diagonal()
    diagonal_PP = torch.eye(num_pairs, dtype=torch.bool, device=loss_PP.device)
    others_P = loss_PP.masked_fill(diagonal_PP, 0).sum(1) / (num_pairs - 1)
    return weight * loss_PP.diagonal() + (1 - weight) * others_P
