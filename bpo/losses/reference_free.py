"""Losses without a reference: if no term has another loss, no reference log-probs are computed.

Notation of `values.py`; Delta = beta (log pi(y_w) - log pi(y_l)); e = label_smoothing; ls = log sigmoid.
Shape letter: P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bpo.losses.options import number_option, require_reverse_kl
from bpo.losses.preference import smoothed_logistic
from bpo.losses.registry import register_loss
from bpo.losses.values import PairValues


@register_loss("cpo", reference=False, smoothing=True)
def cpo(values: PairValues) -> Tensor:
    """-(1 - e) ls(Delta) - e ls(-Delta): L_prefer of CPO, arXiv 2401.08417 eq. 3. Its L_NLL is a term `nll`."""
    require_reverse_kl(values, "cpo")
    return smoothed_logistic(values.beta_P * (values.chosen_logp_P - values.rejected_logp_P), values.label_smoothing)


@register_loss("simpo", reference=False, length="mean", smoothing=True, options={"gamma": 0.5})
def simpo(values: PairValues) -> Tensor:
    """-(1 - e) ls(Delta - gamma) - e ls(gamma - Delta) on means over the tokens: SimPO, arXiv 2405.14734 eq. 6.

    gamma is the target margin itself, TRL's `simpo_gamma`; the authors' code sets gamma / beta (`gamma_beta_ratio`).

    Raises:
        ValueError: gamma is below 0.
    """
    require_reverse_kl(values, "simpo")
    gamma = number_option(values.options, "gamma", at_least=0)
    delta_P = values.beta_P * (values.chosen_logp_P - values.rejected_logp_P)
    return smoothed_logistic(delta_P - gamma, values.label_smoothing)


@register_loss("orpo", reference=False, length="mean")
def orpo(values: PairValues) -> Tensor:
    """-ls(log odds(y_w) - log odds(y_l)), odds(y) = p / (1 - p): L_OR of ORPO, arXiv 2403.07691 eq. 7.

    p = exp(mean over the tokens of log pi(y_t)). The term's weight is ORPO's lambda, its L_SFT a term `nll`; beta does
    not occur.
    """
    require_reverse_kl(values, "orpo")
    return -logsigmoid(_log_odds(values.chosen_logp_P) - _log_odds(values.rejected_logp_P))


def _log_odds(logp_P: Tensor) -> Tensor:
    """log p - log(1 - p) from log p <= 0.

    p is at most 1 - eps of the dtype: log-probs round to 0 where a model is certain of every token, with infinite odds.
    """
    logp_P = logp_P.clamp(max=-torch.finfo(logp_P.dtype).eps)
    # Each form of log(1 - p) cancels where the other does not; they meet at p = 1/2.
    small_p_P, large_p_P = torch.log1p(-torch.exp(logp_P)), torch.log(-torch.expm1(logp_P))
    return logp_P - torch.where(logp_P < -math.log(2), small_p_P, large_p_P)
