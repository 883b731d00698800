"""Preference losses by their closed forms. Run: python -m pytest tests/test_losses.py

Shape letters: N response tokens, C completions, P pairs.
"""

from __future__ import annotations

import math

import pytest
import torch

from bpo.config.training import LossConfig
from bpo.losses import LOSSES, LossInputs, LossOutput, chosen_nll, get_loss, loss_at_reference, register_loss

COMPLETION_OF_TOKEN = torch.tensor([0, 0, 0, 1, 1, 2])
PAIRS = torch.tensor([[0, 1], [0, 2]])
REFERENCE = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25])


def inputs_of(policy_N: torch.Tensor | None = None, weight_N: torch.Tensor | None = None) -> LossInputs:
    policy_N = REFERENCE.clone() if policy_N is None else policy_N
    return LossInputs(policy_N.requires_grad_(), REFERENCE, COMPLETION_OF_TOKEN, 3, PAIRS, weight_N)


def moved(*shift_C: float) -> LossInputs:
    """A policy whose completions' log-probs differ from the reference by given sums, spread over their tokens."""
    num_tokens_C = torch.bincount(COMPLETION_OF_TOKEN)
    return inputs_of(REFERENCE + (torch.tensor(shift_C) / num_tokens_C)[COMPLETION_OF_TOKEN])


def loss_of(inputs: LossInputs, **options: float | str) -> LossOutput:
    config = LossConfig(**options)  # type: ignore[arg-type]
    return get_loss(config.type)(inputs, config)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_sigmoid_at_the_reference_is_log_2_with_gradient_beta_over_2() -> None:
    inputs = inputs_of()
    output = loss_of(inputs, beta=0.1)
    assert output.loss_P.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert output.chosen_reward_P.tolist() == output.rejected_reward_P.tolist() == [0.0, 0.0]
    output.loss_P[0].backward()
    # -beta/2 for every token of the chosen answer, +beta/2 of the rejected one, nothing of the bystander
    assert inputs.policy_logp_N.grad.tolist() == pytest.approx([-0.05] * 3 + [0.05] * 2 + [0.0], abs=1e-8)


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
    inputs = moved(2.0, -1.0, 3.0)
    output = loss_of(inputs, type="sft", beta=0.5)
    expected = -inputs.policy_logp_N[:3].mean().item()
    assert output.loss_P.tolist() == pytest.approx([expected] * 2)
    assert output.rejected_reward_P.tolist() == pytest.approx([-0.5, 1.5], abs=1e-6)
    assert not output.chosen_reward_P.requires_grad
    output.loss_P.sum().backward()
    assert inputs.policy_logp_N.grad.tolist() == pytest.approx([-2 / 3] * 3 + [0.0] * 3)


def test_chosen_nll_is_a_mean_over_the_tokens_of_the_chosen_answer() -> None:
    reversed_pairs = LossInputs(REFERENCE, REFERENCE, COMPLETION_OF_TOKEN, 3, torch.tensor([[1, 0], [2, 0]]))
    assert chosen_nll(reversed_pairs).tolist() == pytest.approx([2.25, 0.25])


def test_token_weights_weigh_the_log_ratios() -> None:
    weight_N = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    inputs = inputs_of(REFERENCE + torch.tensor([0.5, 9.0, 9.0, 0.0, 0.0, 0.0]), weight_N)
    output = loss_of(inputs, beta=1.0)
    assert output.chosen_reward_P.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    output.loss_P.sum().backward()
    assert inputs.policy_logp_N.grad[1:3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "sft"])
def test_the_loss_at_the_reference_ignores_the_policy(name: str) -> None:
    config = LossConfig(type=name, beta=0.1, label_smoothing=0.1 if name in ("sigmoid", "robust") else 0.0)
    expected = get_loss(name)(inputs_of(), config).loss_P
    assert torch.equal(loss_at_reference(config, moved(5.0, 1.0, -4.0)), expected)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "sft"])
def test_gradients_match_finite_differences(name: str) -> None:
    config = LossConfig(type=name, beta=0.3)
    policy_N = (REFERENCE + torch.linspace(-1, 1, 6)).double().requires_grad_()

    def total(policy_N: torch.Tensor) -> torch.Tensor:
        inputs = LossInputs(policy_N, REFERENCE.double(), COMPLETION_OF_TOKEN, 3, PAIRS)
        return get_loss(name)(inputs, config).loss_P.sum()

    assert torch.autograd.gradcheck(total, (policy_N,), atol=1e-5)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="loss.type is 'dpo'; available: hinge, ipo, robust, sft, sigmoid"):
        get_loss("dpo")


def test_registering_a_loss_makes_its_name_valid_and_refuses_a_second() -> None:
    with pytest.raises(ValueError, match="'sigmoid' is registered already"):
        register_loss("sigmoid")(get_loss("hinge"))
    try:
        register_loss("mine")(get_loss("hinge"))
        assert get_loss("mine") is get_loss("hinge")
    finally:
        LOSSES.pop("mine", None)
