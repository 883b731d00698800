"""Losses of the margin by their closed forms. Shape letter: P pairs."""

from __future__ import annotations

import math

import pytest
import torch

from bpo_kernels.plain import preference_loss
from tests.losses.pairs import gradients, loss_of, pair_values

E = 0.2


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_at_the_reference_is_exactly_log_2_with_gradient_beta_over_2() -> None:
    for name in ("sigmoid", "sigmoid_norm", "robust"):
        for label_smoothing in (0.0, E):
            values = pair_values([-7.0], [-3.0], [-7.0], [-3.0], beta=0.3, label_smoothing=label_smoothing)
            assert loss_of(name, values).tolist() == [math.log(2)]
        values = pair_values([-7.0], [-3.0], [-7.0], [-3.0], beta=0.3)
        assert gradients(name, values) == ([-0.15], [0.15])


def test_closed_forms_of_a_margin_of_3() -> None:
    beta, delta = 0.5, 1.5
    expected = {
        "sigmoid": -(1 - E) * log_sigmoid(delta) - E * log_sigmoid(-delta),
        "sigmoid_norm": -(1 - E) * log_sigmoid(delta) - E * log_sigmoid(-delta),
        "robust": (-(1 - E) * log_sigmoid(delta) + E * log_sigmoid(-delta)) / (1 - 2 * E),
        "hinge": 0.0,
        "ipo": (3 - 1 / (2 * beta)) ** 2,
        "exo_pair": sigmoid(delta) * (log_sigmoid(delta) - math.log(1 - E))
        + sigmoid(-delta) * (log_sigmoid(-delta) - math.log(E)),
        "discopop": -sigmoid(-delta / 0.05) * log_sigmoid(delta) + sigmoid(delta / 0.05) * math.exp(-delta),
    }
    for name, loss in expected.items():
        values = pair_values([-1.0], [-2.0], [-2.5], [-0.5], beta=beta, label_smoothing=E)
        assert loss_of(name, values).item() == pytest.approx(loss, rel=1e-12), name


def test_gradients_of_a_margin_of_minus_3() -> None:
    beta, delta = 0.5, -1.5
    q = sigmoid(delta)
    expected = {
        "sigmoid": beta * (-(1 - E) * sigmoid(-delta) + E * q),
        "robust": beta * (-(1 - E) * sigmoid(-delta) - E * q) / (1 - 2 * E),
        "hinge": -beta,
        "ipo": 2 * (-3 - 1 / (2 * beta)),
        # The KL divergence's derivative by the logit: q (1 - q) (logit of the policy - logit of the label).
        "exo_pair": beta * q * (1 - q) * (delta - math.log((1 - E) / E)),
    }
    for name, slope in expected.items():
        values = pair_values([-4.0], [-1.0], beta=beta, label_smoothing=E)
        chosen, rejected = gradients(name, values)
        assert chosen == pytest.approx([slope], rel=1e-12), name
        assert rejected == pytest.approx([-slope], rel=1e-12), name


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_the_kernels_losses_are_those_of_their_plain_twins(name: str) -> None:
    chosen, rejected = [-1.0, -8.0, -3.0], [-2.0, -1.0, -3.0]
    label_smoothing = E if name in ("sigmoid", "robust") else 0.0
    values = pair_values(chosen, rejected, beta=0.3, label_smoothing=label_smoothing)
    logp_N = torch.tensor([*chosen, *rejected], dtype=torch.float64, requires_grad=True)
    pairs_P2 = torch.tensor([[0, 3], [1, 4], [2, 5]])
    loss_P = preference_loss(logp_N, torch.zeros(6), torch.arange(6), pairs_P2, 0.3, label_smoothing, name)[0]
    assert loss_of(name, values).tolist() == pytest.approx(loss_P.tolist(), rel=1e-12)
    loss_P.sum().backward()
    assert logp_N.grad is not None
    assert sum(gradients(name, values), []) == pytest.approx(logp_N.grad.tolist(), rel=1e-12)


def test_label_smoothing_makes_overconfidence_costly() -> None:
    sure = pair_values([0.0], [-120.0], beta=1.0, label_smoothing=0.1, dtype=torch.float32)
    assert loss_of("sigmoid", sure).item() == pytest.approx(0.1 * 120, rel=1e-6)


def test_exo_is_0_where_the_policy_prefers_as_often_as_the_label_says_and_needs_smoothing() -> None:
    matching = pair_values([math.log((1 - E) / E)], [0.0], beta=1.0, label_smoothing=E)
    assert loss_of("exo_pair", matching).item() == pytest.approx(0, abs=1e-15)
    assert gradients("exo_pair", matching)[0] == pytest.approx([0], abs=1e-15)
    with pytest.raises(ValueError, match="loss.label_smoothing is 0.0: exo_pair needs more than 0"):
        loss_of("exo_pair", pair_values([0.0], [0.0]))


def test_discopop_is_logistic_for_wrong_pairs_and_exponential_for_right_ones() -> None:
    values = pair_values([2.0, -2.0, -1e4], [0.0, 0.0, 0.0], beta=1.0, dtype=torch.float32)
    expected = [math.exp(-2), math.log1p(math.exp(2)), 1e4]
    assert loss_of("discopop", values).tolist() == pytest.approx(expected, rel=1e-6)
    assert gradients("discopop", values)[0] == pytest.approx([-math.exp(-2), -sigmoid(2), -1], rel=1e-6)


def test_margin_consistency_shares_the_squared_difference_of_two_consecutive_pairs() -> None:
    # Margins 3 and 1, then -1 and -1; beta does not occur.
    values = pair_values([4.0, 3.0, 0.0, 1.0], [1.0, 2.0, 1.0, 2.0], beta=[0.1, 0.7, 1.0, 1.0])
    assert loss_of("margin_consistency", values).tolist() == [2.0, 2.0, 0.0, 0.0]
    chosen, rejected = gradients("margin_consistency", values)
    assert chosen == [4.0, -4.0, 0.0, 0.0] and rejected == [-4.0, 4.0, 0.0, 0.0]


def test_margin_consistency_refuses_a_pair_without_its_twin() -> None:
    with pytest.raises(ValueError, match="margin_consistency has 3 pairs: its pair rule must give them in twos"):
        loss_of("margin_consistency", pair_values([0.0] * 3, [0.0] * 3))
