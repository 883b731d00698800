"""Losses of the margin: how much more the policy has come to prefer y_w over y_l than the reference does.

Notation of `values.py`; Delta = beta (h(y_w) - h(y_l)), or that of another divergence; e = label_smoothing;
ls = log sigmoid. By ls(-x) = ls(x) - x, a loss smoothed over labels is -ls plus a linear term: a margin of 0 gives
exactly log 2, as in the kernels.
Shape letter: P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bpo.losses.options import number_option
from bpo.losses.registry import register_loss
from bpo.losses.values import PairValues


def smoothed_logistic(delta_P: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1 - e) ls(delta) - e ls(-delta) for any shape of delta; e a number, or a tensor that broadcasts."""
    return label_smoothing * delta_P - logsigmoid(delta_P)


@register_loss("sigmoid", smoothing=True, kernel=True)
def sigmoid(values: PairValues) -> Tensor:
    """-(1 - e) ls(Delta) - e ls(-Delta): DPO, arXiv 2305.18290 eq. 7, BPO, arXiv 2403.08730; e > 0 is cDPO."""
    return smoothed_logistic(values.delta_P, values.label_smoothing)


@register_loss("sigmoid_norm", length="mean", smoothing=True)
def sigmoid_norm(values: PairValues) -> Tensor:
    """`sigmoid` on log-probs per token: the length-normalised DPO of Tulu 3, arXiv 2411.15124."""
    return smoothed_logistic(values.delta_P, values.label_smoothing)


@register_loss("robust", smoothing=True, kernel=True)
def robust(values: PairValues) -> Tensor:
    """(-(1 - e) ls(Delta) + e ls(-Delta)) / (1 - 2e): robust DPO, arXiv 2403.00409.

    An unbiased estimate of the loss without swapped labels, of which a fraction e is swapped. Without a lower bound.
    """
    e = values.label_smoothing
    return smoothed_logistic(values.delta_P, -e / (1 - 2 * e))


@register_loss("hinge", kernel=True)
def hinge(values: PairValues) -> Tensor:
    """max(0, 1 - Delta): the hinge of SLiC-HF, arXiv 2305.10425, on log-ratios as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - values.delta_P)


@register_loss("ipo", length="mean", kernel=True)
def ipo(values: PairValues) -> Tensor:
    """(h(y_w) - h(y_l) - 1 / (2 beta))^2: IPO, arXiv 2310.12036 eq. 17, beta its tau.

    On means over the tokens, as its authors recommend: the distance 1 / (2 beta) does not grow with the length of an
    answer, the sums do.
    """
    return (values.margin_P - 1 / (2 * values.beta_P)).square()


@register_loss("exo_pair", smoothing=True)
def exo_pair(values: PairValues) -> Tensor:
    """q ln(q / (1 - e)) + (1 - q) ln((1 - q) / e), q = sigmoid(Delta): EXO, arXiv 2402.00856 eq. 16.

    The KL divergence of the policy's preference from the label's, the reverse of cDPO's.

    Raises:
        ValueError: label_smoothing is 0, for which the loss is infinite.
    """
    e = values.label_smoothing
    if not 0 < e < 1:
        raise ValueError(f"loss.label_smoothing is {e}: exo_pair needs more than 0 (its paper uses 0.001)")
    delta_P = values.delta_P
    chosen_P, rejected_P = logsigmoid(delta_P), logsigmoid(-delta_P)
    right_P = torch.sigmoid(delta_P) * (chosen_P - math.log1p(-e))
    return right_P + torch.sigmoid(-delta_P) * (rejected_P - math.log(e))


@register_loss("discopop", options={"tau": 0.05})
def discopop(values: PairValues) -> Tensor:
    """-(1 - m) ls(Delta) + m exp(-Delta), m = sigmoid(Delta / tau): DiscoPOP, arXiv 2406.08414 eq. 5.

    The second product is one exponential: as factors, exp(-Delta) overflows where the product is 0.

    Raises:
        ValueError: tau is not above 0.
    """
    tau = number_option(values.options, "tau", above=0)
    delta_P = values.delta_P
    exponential_P = torch.exp(logsigmoid(delta_P / tau) - delta_P)
    return exponential_P - torch.sigmoid(-delta_P / tau) * logsigmoid(delta_P)


@register_loss("margin_consistency", pairs="symmetric")
def margin_consistency(values: PairValues) -> Tensor:
    """(margin_2k - margin_2k+1)^2 of pairs that come in twos, half of it on each: SymMPO's L_Margin, arXiv 2506.11712.

    The two pairs are (y_w over y_w') for the image and (y_w' over y_w) for the other image. As in the authors' code,
    margins carry no beta, and the term's weight is 1e-4.

    Raises:
        ValueError: the number of pairs is odd.
    """
    if len(values.beta_P) % 2:
        raise ValueError(f"margin_consistency has {len(values.beta_P)} pairs: its pair rule must give them in twos")
    first_P, second_P = values.margin_P.view(-1, 2).unbind(1)
    return (0.5 * (first_P - second_P).square()).repeat_interleave(2)
