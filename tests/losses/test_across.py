"""Losses across groups, by their limits and against loops. Shape letters: P pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.losses.pairs import gradients, loss_of, pair_values

CHOSEN, REJECTED, BETA = [1.2, -0.5, 0.3], [-0.7, 0.4, -2.0], 0.5
REFERENCES = ([-3.0, -1.0, -2.0], [-2.5, -4.0, -1.5])


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def ratios(chosen: list[float], rejected: list[float], **fields: object):  # noqa: ANN201
    """Pairs with the given log-ratios to a reference that differs from 0."""
    references = [side[: len(chosen)] for side in REFERENCES]
    logps = [
        [h + reference for h, reference in zip(side, references[k], strict=True)]
        for k, side in enumerate((chosen, rejected))
    ]
    return pair_values(*logps, *references, **{"beta": BETA, **fields})


def test_rpo_by_a_loop_over_the_matrix() -> None:
    cosines = torch.tensor([[1.0, 0.8, -0.1], [0.8, 1.0, 0.2], [-0.1, 0.2, 1.0]], dtype=torch.float64)
    betas, tau = [0.5, 0.1, 2.0], 0.3
    expected = []
    for i in range(3):
        weights = [math.exp(-(1 - cosines[i, j].item()) / tau) for j in range(3)]
        row = [minus_log_sigmoid(betas[i] * weights[j] / sum(weights) * (CHOSEN[i] - REJECTED[j])) for j in range(3)]
        expected.append(sum(row) / 3)
    values = ratios(CHOSEN, REJECTED, beta=betas, similarity_PP=cosines, options={"tau": tau})
    assert loss_of("rpo", values).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_single_pair_is_dpo() -> None:
    values = ratios(CHOSEN[:1], REJECTED[:1], similarity_PP=torch.ones(1, 1))
    for name in ("rpo", "rpo_diagonal", "aot", "aot_unpaired"):
        assert loss_of(name, values).tolist() == pytest.approx(loss_of("sigmoid", values).tolist(), rel=1e-15), name


def test_rpo_with_equal_embeddings_weighs_every_comparison_by_1_over_n() -> None:
    values = ratios(CHOSEN, REJECTED, similarity_PP=torch.full((3, 3), 0.6))
    expected = [sum(minus_log_sigmoid(BETA * (w - l) / 3) for l in REJECTED) / 3 for w in CHOSEN]  # noqa: E741
    assert loss_of("rpo", values).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", [1e-3, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rpo_at_temperature_0_is_dpo_of_each_pair_and_log_2_elsewhere(tau: float, dtype: torch.dtype) -> None:
    # A cosine of a prompt with itself that has been rounded above 1.
    cosines = torch.full((3, 3), 0.2).fill_diagonal_(1.0000001)
    values = ratios(CHOSEN, REJECTED, similarity_PP=cosines, options={"tau": tau}, dtype=dtype)
    dpo = loss_of("sigmoid", values).tolist()
    expected = [(loss + 2 * math.log(2)) / 3 for loss in dpo]
    assert loss_of("rpo", values).tolist() == pytest.approx(expected, rel=1e-6)


def test_rpo_at_the_reference_pulls_towards_similar_prompts_answers_most() -> None:
    cosines = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    values = ratios([0.0] * 3, [0.0] * 3, similarity_PP=cosines)
    assert loss_of("rpo", values).tolist() == pytest.approx([math.log(2)] * 3)
    chosen, rejected = gradients("rpo", values)
    # -beta/2 times the mean weight of a row, which is 1/3.
    assert chosen == pytest.approx([-BETA / 6] * 3)
    assert sum(rejected) == pytest.approx(BETA / 2) and rejected[0] == rejected[1] > rejected[2] > 0


def test_rpo_diagonal_by_a_loop() -> None:
    loss = [[minus_log_sigmoid(BETA * (w - l)) for l in REJECTED] for w in CHOSEN]  # noqa: E741
    for weight in (0.8, 0.5, 1.0):
        expected = [
            weight * loss[i][i] + (1 - weight) * sum(loss[i][j] for j in range(3) if j != i) / 2 for i in range(3)
        ]
        values = ratios(CHOSEN, REJECTED, options={"diagonal_weight": weight})
        assert loss_of("rpo_diagonal", values).tolist() == pytest.approx(expected, rel=1e-12)
    default = loss_of("rpo_diagonal", ratios(CHOSEN, REJECTED)).tolist()
    assert default == loss_of("rpo_diagonal", ratios(CHOSEN, REJECTED, options={"diagonal_weight": 0.8})).tolist()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_compares_quantiles_and_keeps_the_order_of_the_pairs(name: str) -> None:
    policy = ([0.5, -1.0, 2.0], [1.0, 0.0, -1.0])
    reference = ([0.0, 0.1, 0.2], [1.0, 0.4, -0.7])
    values = pair_values(*policy, *reference, beta=1.0, label_smoothing=0.1)
    if name == "aot":
        upper = [w - l for w, l in zip(*policy, strict=True)]  # noqa: E741
        lower = [w - l for w, l in zip(*reference, strict=True)]  # noqa: E741
    else:
        upper = [h - r for h, r in zip(policy[0], reference[0], strict=True)]
        lower = [h - r for h, r in zip(policy[1], reference[1], strict=True)]
    deltas = [u - sorted(lower)[sorted(upper).index(u)] for u in upper]
    expected = [0.9 * minus_log_sigmoid(d) + 0.1 * minus_log_sigmoid(-d) for d in deltas]
    assert loss_of(name, values).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "rpo_diagonal", "rpo"])
def test_the_order_of_the_pairs_does_not_matter(name: str) -> None:
    cosines = torch.tensor([[1.0, 0.8, -0.1], [0.8, 1.0, 0.2], [-0.1, 0.2, 1.0]])
    values, order = ratios(CHOSEN, REJECTED, similarity_PP=cosines), [2, 0, 1]
    fields = "chosen_logp_P rejected_logp_P chosen_reference_P rejected_reference_P beta_P"
    shuffled = replace(
        values,
        similarity_PP=cosines[order][:, order],
        **{field: getattr(values, field)[order] for field in fields.split()},
    )
    assert loss_of(name, shuffled).tolist() == pytest.approx(loss_of(name, values)[order].tolist(), rel=1e-12)
