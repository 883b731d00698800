"""What holds for every registered loss of a pair. Shape letter: P pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bpo.losses.registry import LOSSES
from bpo.losses.values import PairValues
from tests.losses.pairs import gradients, loss_of, pair_values

NAMES = sorted(name for name, loss in LOSSES.items() if loss.function.__module__.startswith("bpo."))
OF_THE_MARGIN = set("sigmoid sigmoid_norm robust hinge ipo exo_pair discopop margin_consistency spa".split())
OF_THE_NLL = {"sft", "nll"}


def values_for(name: str, chosen: list[float], rejected: list[float], **fields: Any) -> PairValues:
    reference = [-2.0] * len(chosen)
    if LOSSES[name].needs_similarity:
        fields["similarity_PP"] = torch.eye(len(chosen))
    return pair_values(
        chosen, rejected, reference, reference, label_smoothing=0.1 if LOSSES[name].smoothing else 0.0, **fields
    )


def test_the_registered_names() -> None:
    assert NAMES == sorted(
        "sigmoid sigmoid_norm robust hinge ipo exo_pair discopop margin_consistency nca_pair sppo_hard apo_zero "
        "apo_down sft nll log_ratio orpo simpo cpo aot aot_unpaired rpo rpo_diagonal bco_pair spa".split()
    )
    assert {name for name in NAMES if LOSSES[name].kernel} == {"sigmoid", "robust", "hinge", "ipo"}
    assert {name for name in NAMES if not LOSSES[name].reference} == {"sft", "nll", "orpo", "simpo", "cpo"}
    assert {name for name in NAMES if LOSSES[name].length == "mean"} == {"ipo", "sigmoid_norm", "orpo", "simpo"}
    assert {name for name in NAMES if LOSSES[name].across_groups} == {"aot", "aot_unpaired", "rpo", "rpo_diagonal"}
    assert {name for name in NAMES if LOSSES[name].needs_similarity} == {"rpo"}
    assert {name for name in NAMES if LOSSES[name].state} == {"bco_pair", "spa"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_pairs_has_no_losses(name: str, dtype: torch.dtype) -> None:
    values = values_for(name, [], [], dtype=dtype)
    loss_P = loss_of(name, values)
    assert loss_P.shape == (0,) and loss_P.dtype is dtype
    assert gradients(name, values) == ([], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_answers_far_from_the_reference_have_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    far, near = -2e4, -1.0
    values = values_for(name, [far, near, far, near], [near, far, far, near], beta=1.0, dtype=dtype)
    loss_P = loss_of(name, values)
    assert loss_P.dtype is dtype and torch.isfinite(loss_P).all()
    for side in gradients(name, values):
        assert torch.isfinite(torch.tensor(side)).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    values = values_for(name, [-1.3, -0.4, -2.2, -3.1], [-1.9, -2.7, -0.6, -3.3], beta=[0.5, 1.0, 2.0, 0.1])

    def total(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
        moved = replace(values, chosen_logp_P=chosen_P, rejected_logp_P=rejected_P, chosen_nll_P=-chosen_P)
        return loss_of(name, moved).sum() + 0 * rejected_P.sum()

    assert torch.autograd.gradcheck(total, (values.chosen_logp_P, values.rejected_logp_P))


@pytest.mark.parametrize("name", [name for name in NAMES if not LOSSES[name].across_groups])
def test_a_pair_has_the_same_loss_in_any_batch_with_its_own_beta(name: str) -> None:
    chosen, rejected, betas = [-1.0, -1.5, -0.3, -2.0], [-2.0, -0.5, -0.9, -0.1], [0.1, 0.5, 1.0, 2.0]
    together = loss_of(name, values_for(name, chosen, rejected, beta=betas))
    for first in (0, 2):  # in twos: margin_consistency couples those
        two = slice(first, first + 2)
        apart = loss_of(name, values_for(name, chosen[two], rejected[two], beta=betas[two]))
        assert apart.tolist() == together[two].tolist()


@pytest.mark.parametrize("name", sorted(set(NAMES) - OF_THE_MARGIN - OF_THE_NLL))
def test_another_divergence_is_refused_where_it_would_have_no_effect(name: str) -> None:
    with pytest.raises(ValueError, match=f"loss.terms.*divergence is 'js', but {name} is defined for reverse_kl only"):
        loss_of(name, values_for(name, [-1.0, -1.0], [-2.0, -2.0], divergence="js"))


@pytest.mark.parametrize("name", sorted(OF_THE_MARGIN))
def test_a_loss_of_the_margin_follows_the_divergence(name: str) -> None:
    losses = {
        tuple(loss_of(name, values_for(name, [-1.0, -2.5], [-2.4, -2.0], divergence=divergence)).tolist())
        for divergence in ("reverse_kl", "forward_kl", "js", "alpha")
    }
    assert len(losses) == 4
