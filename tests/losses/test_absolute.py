"""Losses of each side by itself, by their closed forms."""

from __future__ import annotations

import math

import pytest

from tests.losses.pairs import gradients, loss_of, pair_values


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_at_the_reference() -> None:
    beta = 0.3
    expected = {
        # loss, gradient by log pi(y_w), gradient by log pi(y_l)
        "nca_pair": (2 * math.log(2), -beta / 4, beta / 4),
        "apo_zero": (1.0, -beta / 4, beta / 4),
        "apo_down": (1.0, 0.0, beta / 4),
        "sppo_hard": (2 / (2 * beta) ** 2, -1 / beta, 1 / beta),
        "log_ratio": (0.0, beta, 0.0),
    }
    for name, (loss, chosen, rejected) in expected.items():
        values = pair_values([-5.0], [-2.0], [-5.0], [-2.0], beta=beta)
        assert loss_of(name, values).item() == pytest.approx(loss, rel=1e-12), name
        assert gradients(name, values) == (pytest.approx([chosen], abs=1e-15), pytest.approx([rejected], abs=1e-15))


def test_away_from_the_reference() -> None:
    beta, chosen, rejected = 0.5, 2.0, -3.0  # log-ratios
    w, l = beta * chosen, beta * rejected  # noqa: E741
    log_sigmoid = {x: math.log(sigmoid(x)) for x in (w, -w, l, -l)}
    expected = {
        "nca_pair": -log_sigmoid[w] - 0.5 * log_sigmoid[-w] - 0.5 * log_sigmoid[-l],
        "apo_zero": 1 - sigmoid(w) + sigmoid(l),
        "apo_down": sigmoid(w) + 1 - sigmoid(w - l),
        "sppo_hard": (chosen - 1) ** 2 + (rejected + 1) ** 2,
        "log_ratio": w,
    }
    for name, loss in expected.items():
        values = pair_values([-1.0], [-4.0], [-3.0], [-1.0], beta=beta)
        assert loss_of(name, values).item() == pytest.approx(loss, rel=1e-12), name


def test_once_it_is_ahead_apo_down_lowers_the_preferred_answer_too_and_apo_zero_raises_it() -> None:
    values = pair_values([0.5], [-1.0], beta=1.0)
    assert gradients("apo_down", values)[0][0] > 0 > gradients("apo_zero", values)[0][0]


def test_nca_and_sppo_stop_raising_the_preferred_answer_at_their_target() -> None:
    # NCA: d/dr (-ls(r) - ls(-r)/2) = 0 at sigmoid(r) = 2/3; SPPO: h = 1 / (2 beta).
    assert gradients("nca_pair", pair_values([math.log(2)], [0.0], beta=1.0))[0] == pytest.approx([0], abs=1e-15)
    assert gradients("sppo_hard", pair_values([0.25], [-0.25], beta=2.0)) == ([0.0], [0.0])


@pytest.mark.parametrize("name", ["sft", "nll"])
def test_fine_tuning_takes_the_likelihood_per_token_alone(name: str) -> None:
    values = pair_values([-3.0, -1.0], [-9.0, -9.0], [-4.0, -4.0], beta=0.1)
    assert loss_of(name, values).tolist() == [3.0, 1.0]
    assert gradients(name, values) == ([-1.0, -1.0], [0.0, 0.0])


def test_selms_optimism_adds_alpha_beta_to_dpos_gradient_by_the_answer() -> None:
    alpha, beta = 0.01, 0.3
    values = pair_values([-4.0], [-2.0], [-5.0], [-2.5], beta=beta)
    total = loss_of("sigmoid", values) + alpha * loss_of("log_ratio", values)
    total.sum().backward()
    dpo = gradients("sigmoid", values)
    assert values.chosen_logp_P.grad is not None and values.rejected_logp_P.grad is not None
    assert values.chosen_logp_P.grad.item() - dpo[0][0] == pytest.approx(alpha * beta, rel=1e-12)
    assert values.rejected_logp_P.grad.item() == dpo[1][0]
