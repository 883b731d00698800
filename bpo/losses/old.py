"""Preference losses as functions of the log-ratios of a pair, with their equations; application to a batch.

Notation: h(y) = sum_t w_t (log pi(y_t) - log pi_ref(y_t)) over the tokens of y; y_w preferred, y_l dispreferred;
Delta = beta (h(y_w) - h(y_l)); e = label_smoothing.
Shape letters: N response tokens, K completions, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from bpo.config.training import LossConfig
from bpo.records import LossInputs
from bpo_kernels.checks import LOSS_TYPES, check_preference_options


@dataclass(frozen=True, slots=True)
class PairTerms:
    """Inputs of a preference loss, one entry per pair.

    chosen_ratio_P, rejected_ratio_P: h(y_w) and h(y_l), with gradient.
    chosen_nll_P: mean over the tokens of -log pi(y_w), with gradient.
    """

    chosen_ratio_P: torch.Tensor
    rejected_ratio_P: torch.Tensor
    chosen_nll_P: torch.Tensor

    def delta_P(self, beta: float) -> torch.Tensor:
        return beta * (self.chosen_ratio_P - self.rejected_ratio_P)


PreferenceLoss = Callable[[PairTerms, LossConfig], torch.Tensor]
LOSSES: dict[str, PreferenceLoss] = {}


def register_loss(name: str) -> Callable[[PreferenceLoss], PreferenceLoss]:
    """Registers a loss, one value per pair, under its `loss.type` name."""

    def add(function: PreferenceLoss) -> PreferenceLoss:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is already registered")
        LOSSES[name] = function
        return function

    return add


@register_loss("sigmoid")
def sigmoid(pair: PairTerms, config: LossConfig) -> torch.Tensor:
    """DPO, arXiv 2305.18290 eq. 7, and BPO, arXiv 2403.08730; label smoothing as in cDPO."""
    delta_P, e = pair.delta_P(config.beta), config.label_smoothing
    return -(1 - e) * logsigmoid(delta_P) - e * logsigmoid(-delta_P)


@register_loss("robust")
def robust(pair: PairTerms, config: LossConfig) -> torch.Tensor:
    """Robust DPO, arXiv 2403.00409."""
    delta_P, e = pair.delta_P(config.beta), config.label_smoothing
    return (-(1 - e) * logsigmoid(delta_P) + e * logsigmoid(-delta_P)) / (1 - 2 * e)


@register_loss("hinge")
def hinge(pair: PairTerms, config: LossConfig) -> torch.Tensor:
    """The hinge of SLiC-HF, arXiv 2305.10425, on log-ratios as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - pair.delta_P(config.beta))


@register_loss("ipo")
def ipo(pair: PairTerms, config: LossConfig) -> torch.Tensor:
    """IPO, arXiv 2310.12036 eq. 17."""
    return (pair.delta_P(config.beta) / config.beta - 1 / (2 * config.beta)) ** 2


@register_loss("sft")
def sft(pair: PairTerms, config: LossConfig) -> torch.Tensor:
    """Fine-tuning on the preferred side only, the control in BPO's Table 4. Rewards do not enter the loss."""
    return pair.chosen_nll_P


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss of each pair [P] and the quantities that metrics report, in fp32.

    loss_P: preference_P + loss.chosen_nll_weight * nll_P, with gradient.
    preference_P: the preference loss.
    nll_P: mean negative log-likelihood per token of the preferred answer.
    chosen_reward_P, rejected_reward_P: beta h(y_w) and beta h(y_l), detached.
    logp_N: log-probs of the response tokens.
    """

    loss_P: torch.Tensor
    preference_P: torch.Tensor
    nll_P: torch.Tensor
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor
    logp_N: torch.Tensor


def get_loss(name: str) -> PreferenceLoss:
    if name not in LOSSES:
        raise ValueError(f"loss.type is {name!r}; available: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


def is_fused(config: LossConfig) -> bool:
    """Whether the kernels compute this loss together with the LM head."""
    return config.type in LOSS_TYPES


def check_loss(config: LossConfig) -> None:
    """Evaluates the loss on one pair, so that an invalid name or option fails before any long work starts.

    Raises:
        ValueError: the name is unknown, or an option does not apply to the loss.
    """
    zero_P = torch.zeros(1)
    if is_fused(config):
        check_preference_options(config.beta, config.label_smoothing, config.type)
    get_loss(config.type)(PairTerms(zero_P, zero_P, zero_P), config)


def fused_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], inputs: LossInputs, config: LossConfig
) -> LossOutput:
    """Output from the results of the fused head and loss: losses and rewards of both sides [P], log-probs [N]."""
    preference_P, chosen_P, rejected_P, logp_N = outputs
    nll_P = chosen_nll(logp_N, inputs)
    return LossOutput(_total(preference_P, nll_P, config), preference_P, nll_P, chosen_P, rejected_P, logp_N)


def loss_of_logp(logp_N: torch.Tensor, inputs: LossInputs, config: LossConfig) -> LossOutput:
    """Output from token log-probs [N], for a loss that the kernels do not implement."""
    assert inputs.reference is not None
    ratio_N = logp_N - inputs.reference
    if inputs.token_weight_N is not None:
        ratio_N = ratio_N * inputs.token_weight_N
    chosen_P, rejected_P = inputs.sequence_sum(ratio_N)[inputs.pairs_P2].unbind(1)
    nll_P = chosen_nll(logp_N, inputs)
    preference_P = get_loss(config.type)(PairTerms(chosen_P, rejected_P, nll_P), config)
    rewards = (config.beta * chosen_P.detach(), config.beta * rejected_P.detach())
    return LossOutput(_total(preference_P, nll_P, config), preference_P, nll_P, *rewards, logp_N)


def chosen_nll(logp_N: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """Mean negative log-likelihood per token of each pair's preferred answer, [P]: a regulariser."""
    tokens_K = inputs.sequence_sum(torch.ones_like(logp_N))
    nll_K = -inputs.sequence_sum(logp_N) / tokens_K
    return nll_K[inputs.pairs_P2[:, 0]]


def _total(preference_P: torch.Tensor, nll_P: torch.Tensor, config: LossConfig) -> torch.Tensor:
    return preference_P + config.chosen_nll_weight * nll_P


def loss_at_reference(inputs: LossInputs, config: LossConfig) -> torch.Tensor:
    """Preference loss [P] of a policy equal to the reference (log 2 for sigmoid), as expected of the first step."""
    assert inputs.reference is not None
    zero_P = torch.zeros(len(inputs.pairs_P2), device=inputs.pairs_P2.device)
    return get_loss(config.type)(PairTerms(zero_P, zero_P, chosen_nll(inputs.reference, inputs)), config)
