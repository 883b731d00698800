"""Losses without a reference, by their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from tests.losses.pairs import gradients, loss_of, pair_values


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_orpo_of_equally_likely_answers_is_log_2() -> None:
    assert loss_of("orpo", pair_values([-0.7, -3.0], [-0.7, -3.0])).tolist() == [math.log(2)] * 2


def test_orpo_by_probabilities() -> None:
    p, q = 0.6, 0.25
    values = pair_values([math.log(p)], [math.log(q)])
    ratio = (p / (1 - p)) / (q / (1 - q))
    assert loss_of("orpo", values).item() == pytest.approx(-math.log(sigmoid(math.log(ratio))), rel=1e-12)
    # d log odds / d log p = 1 / (1 - p)
    slope = sigmoid(-math.log(ratio))
    chosen, rejected = gradients("orpo", values)
    assert chosen == pytest.approx([-slope / (1 - p)]) and rejected == pytest.approx([slope / (1 - q)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_orpo_of_an_answer_that_the_model_is_certain_of_is_finite(dtype: torch.dtype) -> None:
    values = pair_values([-0.5, 0.0, 0.0], [0.0, -0.5, 0.0], dtype=dtype)
    loss_P = loss_of("orpo", values)
    assert loss_P[0] > 10 and loss_P[1] < 1e-5 and loss_P[2].item() == pytest.approx(math.log(2))
    for side in gradients("orpo", values):
        assert all(math.isfinite(slope) for slope in side)


def test_orpo_is_accurate_for_probabilities_near_0_and_near_1() -> None:
    values = pair_values([-1e-4, -25.0], [-25.0, -1e-4], dtype=torch.float32)
    odds = -1e-4 - math.log(-math.expm1(-1e-4)) + 25.0
    assert loss_of("orpo", values)[1].item() == pytest.approx(odds, rel=1e-6)
    assert loss_of("orpo", values)[0].item() == pytest.approx(math.exp(-odds), rel=1e-4)


def test_simpo_wants_a_margin_of_gamma() -> None:
    beta, gamma = 2.0, 0.8
    at_target = pair_values([-1.0], [-1.4], beta=beta, options={"gamma": gamma})
    assert loss_of("simpo", at_target).item() == pytest.approx(math.log(2))
    assert gradients("simpo", at_target) == (pytest.approx([-beta / 2]), pytest.approx([beta / 2]))
    smoothed = pair_values([-1.0], [-2.0], beta=beta, options={"gamma": gamma}, label_smoothing=0.1)
    x = beta - gamma
    expected = -0.9 * math.log(sigmoid(x)) - 0.1 * math.log(sigmoid(-x))
    assert loss_of("simpo", smoothed).item() == pytest.approx(expected, rel=1e-12)


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    values = pair_values([-1.0, -8.0], [-3.0, -2.0], beta=0.2, label_smoothing=0.1)
    assert loss_of("cpo", values).tolist() == loss_of("sigmoid", values).tolist()


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_a_reference_given_by_another_term_has_no_effect(name: str) -> None:
    alone = loss_of(name, pair_values([-1.0], [-2.0]))
    assert loss_of(name, pair_values([-1.0], [-2.0], [-0.5], [-4.0])).tolist() == alone.tolist()
