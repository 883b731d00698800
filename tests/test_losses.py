"""Preference losses by their closed forms.

Shape letters: N response tokens, K completions, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bpo.config.training import LossConfig
from bpo.losses import (
    LOSSES,
    LossOutput,
    chosen_nll,
    fused_loss,
    get_loss,
    loss_at_reference,
    loss_of_logp,
    register_loss,
)
from bpo.records import LossInputs
from bpo_kernels.dispatch import preference_loss

COMPLETION_OF_TOKEN, STARTS = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 3, 5, 6])
PAIRS = torch.tensor([[0, 1], [0, 2]])
REFERENCE = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25])


def inputs_of(pairs_P2: torch.Tensor = PAIRS, weight_N: torch.Tensor | None = None) -> LossInputs:
    return LossInputs(COMPLETION_OF_TOKEN, STARTS, pairs_P2, torch.ones(len(pairs_P2)), weight_N, REFERENCE)


def moved(*shift_K: float) -> torch.Tensor:
    """A policy whose completions' log-probs differ from the reference by given sums, spread over their tokens."""
    num_tokens_K = torch.bincount(COMPLETION_OF_TOKEN)
    return (REFERENCE + (torch.tensor(shift_K) / num_tokens_K)[COMPLETION_OF_TOKEN]).requires_grad_()


def loss_of(policy_N: torch.Tensor, inputs: LossInputs | None = None, **options: float | str) -> LossOutput:
    return loss_of_logp(policy_N, inputs or inputs_of(), LossConfig(**options))  # type: ignore[arg-type]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_sigmoid_at_the_reference_is_log_2_with_gradient_beta_over_2() -> None:
    policy_N = moved(0.0, 0.0, 0.0)
    output = loss_of(policy_N, beta=0.1)
    assert output.loss_P.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert output.chosen_reward_P.tolist() == output.rejected_reward_P.tolist() == [0.0, 0.0]
    output.loss_P[0].backward()
    # -beta/2 per token of the chosen answer, +beta/2 of the rejected one, 0 of a completion in no pair
    assert policy_N.grad.tolist() == pytest.approx([-0.05] * 3 + [0.05] * 2 + [0.0], abs=1e-8)


def test_losses_and_rewards_equal_their_closed_forms() -> None:
    beta, shift = 0.5, (2.0, -1.0, 3.0)
    margins = [beta * (shift[0] - shift[1]), beta * (shift[0] - shift[2])]
    expected = {
        "sigmoid": [-log_sigmoid(m) for m in margins],
        "hinge": [max(0.0, 1 - m) for m in margins],
        "ipo": [(m / beta - 1 / (2 * beta)) ** 2 for m in margins],
    }
    for name, values in expected.items():
        output = loss_of(moved(*shift), type=name, beta=beta)
        assert output.loss_P.tolist() == pytest.approx(values, abs=1e-5), name
        assert output.chosen_reward_P.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
        assert output.rejected_reward_P.tolist() == pytest.approx([-0.5, 1.5], abs=1e-6)
        assert not output.chosen_reward_P.requires_grad and not output.rejected_reward_P.requires_grad
        assert output.loss_P.requires_grad


def test_label_smoothing_and_robust() -> None:
    e, margin = 0.2, 0.5 * 3.0
    right, wrong = log_sigmoid(margin), log_sigmoid(-margin)
    smoothed = loss_of(moved(2.0, -1.0, 0.0), beta=0.5, label_smoothing=e).loss_P[0]
    assert smoothed.item() == pytest.approx(-(1 - e) * right - e * wrong, abs=1e-6)
    robust = loss_of(moved(2.0, -1.0, 0.0), type="robust", beta=0.5, label_smoothing=e).loss_P[0]
    assert robust.item() == pytest.approx((-(1 - e) * right + e * wrong) / (1 - 2 * e), abs=1e-6)


def test_label_smoothing_makes_overconfidence_costly() -> None:
    sure = loss_of(moved(60.0, -60.0, 0.0), beta=1.0, label_smoothing=0.1).loss_P[0]
    assert sure.item() == pytest.approx(0.1 * 120, rel=1e-4)


def test_sft_is_the_chosen_likelihood_alone_with_the_rewards_of_dpo() -> None:
    policy_N = moved(2.0, -1.0, 3.0)
    output = loss_of(policy_N, type="sft", beta=0.5)
    expected = -policy_N[:3].mean().item()
    assert output.loss_P.tolist() == pytest.approx([expected] * 2)
    assert output.rejected_reward_P.tolist() == pytest.approx([-0.5, 1.5], abs=1e-6)
    assert not output.chosen_reward_P.requires_grad
    output.loss_P.sum().backward()
    assert policy_N.grad.tolist() == pytest.approx([-2 / 3] * 3 + [0.0] * 3)


def test_chosen_nll_is_a_mean_over_the_tokens_of_the_chosen_answer() -> None:
    assert chosen_nll(REFERENCE, inputs_of(torch.tensor([[1, 0], [2, 0]]))).tolist() == pytest.approx([2.25, 0.25])


def test_token_weights_weigh_the_log_ratios() -> None:
    weight_N = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    policy_N = (REFERENCE + torch.tensor([0.5, 9.0, 9.0, 0.0, 0.0, 0.0])).requires_grad_()
    output = loss_of(policy_N, inputs_of(weight_N=weight_N), beta=1.0)
    assert output.chosen_reward_P.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    output.loss_P.sum().backward()
    assert policy_N.grad[1:3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "sft"])
def test_the_loss_at_the_reference_is_that_of_a_policy_equal_to_it(name: str) -> None:
    config = LossConfig(type=name, beta=0.1, label_smoothing=0.1 if name in ("sigmoid", "robust") else 0.0)
    expected = loss_of_logp(REFERENCE, inputs_of(), config).preference_P
    assert torch.equal(loss_at_reference(inputs_of(), config), expected)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust"])
def test_the_fused_loss_is_the_equation(name: str) -> None:
    """The kernels' losses and rewards equal those of this module, and so do their gradients."""
    config = LossConfig(type=name, beta=0.3, label_smoothing=0.1 if name in ("sigmoid", "robust") else 0.0)
    weight_N = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0])
    inputs = inputs_of(weight_N=weight_N)
    gradients = []
    for fused in (True, False):
        policy_N = moved(2.0, -1.0, 3.0).detach().requires_grad_()
        if fused:
            options = (config.beta, config.label_smoothing, name, weight_N)
            pairs = preference_loss(policy_N, REFERENCE, COMPLETION_OF_TOKEN, PAIRS, *options)
            output = fused_loss((*pairs, policy_N), inputs, config)
            expected = output
        else:
            output = loss_of_logp(policy_N, inputs, config)
        output.loss_P.sum().backward()
        gradients.append(policy_N.grad)
    for field in ("loss_P", "preference_P", "nll_P", "chosen_reward_P", "rejected_reward_P"):
        assert getattr(output, field).tolist() == pytest.approx(getattr(expected, field).tolist(), abs=1e-6), field
    assert gradients[0].tolist() == pytest.approx(gradients[1].tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "sft"])
def test_gradients_match_finite_differences(name: str) -> None:
    config = LossConfig(type=name, beta=0.3, chosen_nll_weight=0.5)
    policy_N = (REFERENCE + torch.linspace(-1, 1, 6)).double().requires_grad_()
    inputs = replace(inputs_of(), reference=REFERENCE.double())
    assert torch.autograd.gradcheck(lambda policy_N: loss_of_logp(policy_N, inputs, config).loss_P.sum(), (policy_N,))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="loss.type is 'dpo'; available: hinge, ipo, robust, sft, sigmoid"):
        get_loss("dpo")


def test_registering_a_loss_makes_its_name_valid_and_refuses_a_second() -> None:
    with pytest.raises(ValueError, match="'sigmoid' is already registered"):
        register_loss("sigmoid")(get_loss("hinge"))
    try:
        register_loss("mine")(get_loss("hinge"))
        assert get_loss("mine") is get_loss("hinge")
    finally:
        LOSSES.pop("mine", None)
