"""Pure preference losses: token log-probs of policy and reference in, a loss a pair and detached rewards out.

Notation: y_w preferred, y_l dispreferred, r(y) = beta * sum_t w_t (log pi(y_t) - log pi_ref(y_t)),
Delta = r(y_w) - r(y_l).
Shape letters: N response tokens, C completions, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bpo.config.training import LossConfig
from bpo.model.head import PreferenceTerms
from bpo_kernels.checks import LOSS_TYPES
from bpo_kernels.dispatch import preference_loss


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What every preference loss may use.

    policy_logp_N, reference_logp_N: fp32 token log-probs; the policy's carries the gradient.
    completion_of_token_N: which of the `num_completions` completions a token belongs to.
    pairs_P2: (preferred, dispreferred) completion indices.
    token_weight_N: weight of each token's log-ratio, or None for 1.
    completion_starts_C1: where each completion's tokens begin and the last one's end, where they stand in order.
    """

    policy_logp_N: torch.Tensor
    reference_logp_N: torch.Tensor
    completion_of_token_N: torch.Tensor
    num_completions: int
    pairs_P2: torch.Tensor
    token_weight_N: torch.Tensor | None = None
    completion_starts_C1: torch.Tensor | None = None

    def sequence_sum(self, value_N: torch.Tensor) -> torch.Tensor:
        """Sums a token quantity over each completion, in fp32: [N] -> [C]."""
        zeros_C = torch.zeros(self.num_completions, dtype=value_N.dtype, device=value_N.device)
        return zeros_C.index_add(0, self.completion_of_token_N, value_N)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Losses [P] with gradient; rewards [P] of both sides, detached."""

    loss_P: torch.Tensor
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor


PreferenceLoss = Callable[[LossInputs, LossConfig], LossOutput]
LOSSES: dict[str, PreferenceLoss] = {}


def register_loss(name: str) -> Callable[[PreferenceLoss], PreferenceLoss]:
    """Adds a loss under the name that `loss.type` takes."""

    def add(function: PreferenceLoss) -> PreferenceLoss:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already")
        LOSSES[name] = function
        return function

    return add


def get_loss(name: str) -> PreferenceLoss:
    if name not in LOSSES:
        raise ValueError(f"loss.type is {name!r}; available: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


def check_loss(config: LossConfig) -> None:
    """Tries the loss on one pair, so that a wrong name or option is refused before anything long begins.

    Raises:
        ValueError: the name is unknown, or an option does not go with the loss.
    """
    logp_N = torch.zeros(2, requires_grad=True)
    pair = LossInputs(logp_N, torch.zeros(2), torch.tensor([0, 1]), 2, torch.tensor([[0, 1]]))
    get_loss(config.type)(pair, config)


def _fused(loss_type: str) -> PreferenceLoss:
    def loss(inputs: LossInputs, config: LossConfig) -> LossOutput:
        loss_P, chosen_P, rejected_P = preference_loss(
            inputs.policy_logp_N,
            inputs.reference_logp_N,
            inputs.completion_of_token_N,
            inputs.pairs_P2,
            config.beta,
            label_smoothing=config.label_smoothing,
            loss_type=loss_type,
            token_weight_N=inputs.token_weight_N,
            num_completions=inputs.num_completions,
            completion_starts_K1=inputs.completion_starts_C1,
        )
        return LossOutput(loss_P, chosen_P, rejected_P)

    return loss


def with_loss(
    forward: Callable[[PreferenceTerms | None], Any], constants: dict[str, Any], config: LossConfig
) -> tuple[LossInputs, LossOutput]:
    """Runs the model and its loss: in one autograd function with the LM head where the kernels know the loss.

    Args:
        forward: the model on a batch: log-probs [N], or with terms losses, rewards of both sides and log-probs.
        constants: the fields of `LossInputs` other than `policy_logp_N`.
    """
    if config.type not in LOSS_TYPES:
        inputs = LossInputs(policy_logp_N=forward(None), **constants)
        return inputs, get_loss(config.type)(inputs, config)
    names = dict(constants)
    terms = PreferenceTerms(
        reference=names.pop("reference_logp_N"),
        loss_type=config.type,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        **names,
    )
    loss_P, chosen_P, rejected_P, logp_N = forward(terms)
    return LossInputs(policy_logp_N=logp_N, **constants), LossOutput(loss_P, chosen_P, rejected_P)


# With e = label_smoothing:
# DPO, arXiv 2305.18290 eq. 7, and BPO, arXiv 2403.08730: -(1 - e) log sigma(Delta) - e log sigma(-Delta)
register_loss("sigmoid")(_fused("sigmoid"))
# SLiC, arXiv 2305.10425: max(0, 1 - Delta)
register_loss("hinge")(_fused("hinge"))
# IPO, arXiv 2310.12036 eq. 17: (Delta / beta - 1 / (2 beta))^2
register_loss("ipo")(_fused("ipo"))
# Robust DPO, arXiv 2403.00409: (-(1 - e) log sigma(Delta) + e log sigma(-Delta)) / (1 - 2 e)
register_loss("robust")(_fused("robust"))


@register_loss("sft")
def chosen_likelihood(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """-(mean over tokens of log pi(y_w)): fine-tuning on the preferred side alone, the control of the paper's Table 4.

    Rewards are reported as for DPO, and do not enter the loss.
    """
    chosen_P, rejected_P = inputs.pairs_P2.unbind(1)
    reward_C = config.beta * inputs.sequence_sum(inputs.policy_logp_N - inputs.reference_logp_N).detach()
    return LossOutput(chosen_nll(inputs), reward_C[chosen_P], reward_C[rejected_P])


def chosen_nll(inputs: LossInputs) -> torch.Tensor:
    """Mean negative log-likelihood per token of each pair's preferred answer, [P]: keeps both sides from sinking."""
    tokens_C = inputs.sequence_sum(torch.ones_like(inputs.policy_logp_N))
    nll_C = -inputs.sequence_sum(inputs.policy_logp_N) / tokens_C
    return nll_C[inputs.pairs_P2[:, 0]]


def loss_at_reference(config: LossConfig, reference: LossInputs) -> torch.Tensor:
    """The preference loss [P] of a policy equal to the reference: log 2 for sigmoid. The first step must give it."""
    same = LossInputs(
        reference.reference_logp_N,
        reference.reference_logp_N,
        reference.completion_of_token_N,
        reference.num_completions,
        reference.pairs_P2,
        reference.token_weight_N,
        reference.completion_starts_C1,
    )
    return get_loss(config.type)(same, config).loss_P
