"""Sums over the tokens of cells and of sides of pairs.

Shape letters: N response tokens (with second targets), K cells, P pairs, E weighed tokens.
"""

from __future__ import annotations

import pytest
import torch

from bpo.losses.sums import CellSums
from bpo.records import LossInputs, WeighedTokens

# Cells of 3, 1, 0 and 2 tokens; the last one of second targets.
CELL_N = torch.tensor([0, 0, 0, 1, 3, 3])
LOGP_N = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -7.0])
REFERENCE_N = torch.tensor([-0.5, -0.5, -0.5, -1.5, -2.5, -3.5])


def inputs_of(**fields: object) -> LossInputs:
    values: dict[str, object] = {
        "completion_of_token_N": CELL_N,
        "completion_starts_K1": torch.tensor([0, 3, 4, 4, 6]),
        "pairs_P2": torch.tensor([[0, 1], [3, -1], [-1, 2]]),
        "pair_weight_P": torch.ones(3),
        "pair_beta_P": torch.ones(3),
        "pairs_of_term": (1, 2),
        "reference": REFERENCE_N,
    }
    return LossInputs(**{**values, **fields})  # type: ignore[arg-type]


def test_sums_and_means_of_both_models_with_anchors() -> None:
    inputs = inputs_of()
    sums = CellSums(LOGP_N, inputs)
    logp_P2, reference_P2 = sums.plain(inputs.pairs_P2, mean=False)
    assert logp_P2.tolist() == [[-6, -4], [-12, 0], [0, 0]]
    assert reference_P2.tolist() == [[-1.5, -1.5], [-6, 0], [0, 0]]
    logp_P2, reference_P2 = sums.plain(inputs.pairs_P2, mean=True)
    assert logp_P2.tolist() == [[-2, -4], [-6, 0], [0, 0]]
    assert reference_P2.tolist() == [[-0.5, -1.5], [-3, 0], [0, 0]]
    assert sums.tokens(inputs.pairs_P2).tolist() == [[3, 1], [2, 0], [0, 0]]
    assert sums.nll(torch.tensor([0, 1, 2, 3])).tolist() == [2, 4, 0, 6]


def test_without_a_reference_its_log_probs_are_zero() -> None:
    inputs = inputs_of(reference=None)
    for mean in (False, True):
        assert not CellSums(LOGP_N, inputs).plain(inputs.pairs_P2, mean)[1].any()


def test_a_mean_divides_the_gradient_among_its_tokens() -> None:
    inputs = inputs_of()
    leaf_N = LOGP_N.clone().requires_grad_()
    sums = CellSums(leaf_N, inputs)
    logp_P2, _ = sums.plain(inputs.pairs_P2[:1], mean=True)
    (gradient_N,) = torch.autograd.grad(logp_P2.sum() + 2 * sums.nll(torch.tensor([3])).sum(), leaf_N)
    assert gradient_N.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, -1, -1])


def test_an_anchor_has_no_gradient() -> None:
    leaf_N = LOGP_N.clone().requires_grad_()
    logp_P2, _ = CellSums(leaf_N, inputs_of()).plain(torch.tensor([[-1, -1]]), mean=False)
    (gradient_N,) = torch.autograd.grad(logp_P2.sum(), leaf_N)
    assert not gradient_N.any()


def test_log_probs_may_lack_those_of_second_targets() -> None:
    """The reference's are there: only the policy of the kernels' path has none."""
    inputs = inputs_of()
    logp_P2, reference_P2 = CellSums(LOGP_N[:4], inputs).plain(inputs.pairs_P2, mean=False)
    assert logp_P2.tolist() == [[-6, -4], [0, 0], [0, 0]]
    assert reference_P2.tolist() == [[-1.5, -1.5], [-6, 0], [0, 0]]


# Pair 0 is of the first term, pairs 1 and 2 of the second; a token may be in several sides.
WEIGHED = WeighedTokens(
    token_E=torch.tensor([0, 1, 2, 3, 4, 5]),
    side_E=torch.tensor([0, 0, 0, 1, 2, 2]),
    weight_E=torch.tensor([1.0, 0.5, 2.0, 3.0, 0.25, 0.75]),
    tokens_of_term=(4, 2),
)


def test_weighed_sums_of_each_term() -> None:
    inputs = inputs_of(weighed=WEIGHED)
    sums = CellSums(LOGP_N, inputs)
    logp_P2, reference_P2 = sums.weighed(0, 0, 1, mean=False)
    assert logp_P2.tolist() == [[-8, -12]] and reference_P2.tolist() == [[-1.75, -4.5]]
    logp_P2, reference_P2 = sums.weighed(1, 1, 3, mean=False)
    assert logp_P2.tolist() == [[-6.5, 0], [0, 0]] and reference_P2.tolist() == [[-3.25, 0], [0, 0]]
    assert not CellSums(LOGP_N, inputs_of(weighed=WEIGHED, reference=None)).weighed(0, 0, 1, mean=False)[1].any()


def test_a_weighed_mean_is_divided_by_the_sum_of_the_weights() -> None:
    inputs = inputs_of(weighed=WEIGHED)
    logp_P2, reference_P2 = CellSums(LOGP_N, inputs).weighed(0, 0, 1, mean=True)
    assert logp_P2.tolist() == [[pytest.approx(-8 / 3.5), -4]]
    assert reference_P2.tolist() == [[-0.5, -1.5]]
    assert CellSums(LOGP_N, inputs).weighed(1, 1, 3, mean=True)[0].tolist() == [[-6.5, 0], [0, 0]]


def test_a_side_whose_tokens_all_weigh_nothing_is_zero() -> None:
    nothing = WeighedTokens(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(2), (2,))
    leaf_N = LOGP_N.clone().requires_grad_()
    logp_P2, reference_P2 = CellSums(leaf_N, inputs_of(weighed=nothing)).weighed(0, 0, 1, mean=True)
    assert logp_P2.tolist() == [[0, 0]] and reference_P2.tolist() == [[0, 0]]
    (gradient_N,) = torch.autograd.grad(logp_P2.sum(), leaf_N)
    assert not gradient_N.any()


def test_the_gradient_of_a_weighed_sum_is_its_weights() -> None:
    leaf_N = LOGP_N.clone().requires_grad_()
    logp_P2, _ = CellSums(leaf_N, inputs_of(weighed=WEIGHED)).weighed(0, 0, 1, mean=False)
    (gradient_N,) = torch.autograd.grad(logp_P2.sum(), leaf_N)
    assert gradient_N.tolist() == [1, 0.5, 2, 3, 0, 0]
