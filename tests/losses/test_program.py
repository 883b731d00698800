"""Lists of terms applied to the log-probs of a batch.

Shape letters: N response tokens, P pairs, C numbers that a state collects of a pair.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.data.cells import Cell
from bpo.losses.program import LossProgram
from bpo.losses.registry import LOSSES
from tests.losses.batches import GROUPS, Batch
from tests.losses.pairs import loss_of as loss
from tests.losses.pairs import pair_values

VIEWS = {"crop": ViewConfig(type="crop"), "noise": ViewConfig(type="noise")}
KERNEL_LOSSES = sorted(name for name, loss in LOSSES.items() if loss.kernel)
# (group, preferred answer, dispreferred answer, weight, factor of beta) of GROUPS.
PAIRS = ((0, 0, 1, 1.0, 0.5), (0, 0, 2, 2.0, 2.0), (1, 0, 1, 1.0, 1.0))
CHOSEN = ((0, 0, 3.0), (1, 0, 1.0))


def loss_of(*terms: TermConfig, **options: Any) -> LossConfig:
    return LossConfig(terms=list(terms), views=VIEWS, **options)


def mdpo(**options: Any) -> LossConfig:
    """With weights and betas of their own."""
    return loss_of(
        TermConfig(name="text", **options),
        TermConfig(name="image", pairs="image", against="crop", weight=0.7, beta=0.3, **options),
        TermConfig(name="anchor", pairs="chosen", weight=0.4, **options),
        beta=0.5,
    )


def clean(completion: int) -> Cell:
    return Cell("", completion)


@pytest.mark.parametrize("length", ["auto", "sum", "mean"])
@pytest.mark.parametrize("name", KERNEL_LOSSES)
def test_the_kernels_with_the_head_compute_what_the_log_probs_give(name: str, length: str) -> None:
    smoothing = 0.1 if LOSSES[name].smoothing else 0.0
    batch = Batch(mdpo(type=name, length=length, label_smoothing=smoothing))
    assert batch.program.in_kernel == (0, 1, 2)
    assert batch.head_output().losses_F is not None
    fused, general = batch.output(), batch.general_output()
    batch.assert_same(fused.total, general.total)  # 1e-6: the head's weights of means are fp32
    for field in ("term_sums_T", "loss_P", "logp_N"):
        torch.testing.assert_close(getattr(fused, field), getattr(general, field), rtol=1e-6, atol=0)
    for entry in fields(fused.rewards):
        torch.testing.assert_close(
            getattr(fused.rewards, entry.name), getattr(general.rewards, entry.name), rtol=1e-6, atol=0
        )


def test_mdpo_written_out() -> None:
    batch = Batch(mdpo())
    text = image = anchor = torch.zeros((), dtype=torch.float64)
    for group, better, worse, weight, factor in PAIRS:
        chosen, rejected = batch.ratio(group, clean(better)), batch.ratio(group, clean(worse))
        cropped = batch.ratio(group, Cell("crop", better))
        text = text + weight * softplus(-0.5 * factor * (chosen - rejected))
        image = image + weight * softplus(-0.3 * factor * (chosen - cropped))
        anchor = anchor + weight * softplus(-0.5 * factor * chosen)
    for output in (batch.output(), batch.general_output()):
        batch.assert_same(output.total, text + 0.7 * image + 0.4 * anchor)
        torch.testing.assert_close(output.term_sums_T, torch.stack([text, image, anchor]).detach(), rtol=1e-6, atol=0)
        assert output.term_sums_T.sum().item() == pytest.approx(output.loss_P.sum().item())


def test_mpo_written_out_with_one_of_its_terms_in_the_kernel() -> None:
    terms = (
        TermConfig(name="preference", weight=0.8),
        TermConfig(type="bco_pair", name="quality", weight=0.2),
        TermConfig(type="nll", name="generation", weight=0.5),
    )
    batch = Batch(loss_of(*terms, beta=0.2))
    assert batch.program.in_kernel == (0,) and batch.program.names == ("preference", "quality", "generation")
    total = torch.zeros((), dtype=torch.float64)
    for group, better, worse, weight, factor in PAIRS:
        chosen, rejected = (0.2 * factor * batch.ratio(group, clean(k)) for k in (better, worse))
        total = total + 0.8 * weight * softplus(rejected - chosen)
        total = total - 0.2 * weight * (logsigmoid(chosen) + logsigmoid(-rejected))
        total = total - 0.5 * weight * batch.logp(group, clean(better)).mean()
    batch.assert_same(batch.output().total, total)
    batch.assert_same(batch.general_output().total, total)


def test_the_short_form_with_chosen_nll_is_its_list() -> None:
    short = Batch(LossConfig(beta=0.3, label_smoothing=0.1, chosen_nll_weight=0.25))
    listed = Batch(loss_of(TermConfig(label_smoothing=0.1), TermConfig(type="nll", weight=0.25), beta=0.3))
    assert short.program.names == listed.program.names == ("sigmoid", "nll")
    assert short.output().total.item() == listed.output().total.item()
    for own, other in zip(short.gradients(short.output().total), listed.gradients(listed.output().total), strict=True):
        assert torch.equal(own, other)


ELSEWHERE = [
    TermConfig(label_smoothing=0.1),
    TermConfig(type="hinge"),
    TermConfig(length="mean"),
    TermConfig(divergence="js"),
    TermConfig(token_weights="data"),
    TermConfig(ld_alpha=0.5),
    TermConfig(type="apo_zero"),
    TermConfig(type="nll"),
    TermConfig(guidance=1.5, guidance_view="noise"),
]


@pytest.mark.parametrize("other", ELSEWHERE, ids=lambda term: f"{term.type}-{term.length}-{term.divergence}")
def test_the_kernels_take_the_terms_that_share_loss_smoothing_and_length(other: TermConfig) -> None:
    alike = TermConfig(pairs="image", against="crop", weight=0.3, beta=2.0, length="sum")
    batch = Batch(loss_of(TermConfig(), replace(other, name="other"), alike))
    assert batch.program.in_kernel == (0, 2)
    batch.assert_same(batch.output().total, batch.general_output().total, rtol=1e-9)


def test_a_first_term_that_the_kernels_cannot_compute_leaves_them_the_others() -> None:
    assert LossProgram(loss_of(TermConfig(type="exo_pair", label_smoothing=0.1), TermConfig())).in_kernel == (1,)
    assert LossProgram(LossConfig(type="ipo")).in_kernel == (0,)
    assert LossProgram(LossConfig(type="simpo")).in_kernel == ()


@pytest.mark.parametrize(
    "term", [TermConfig(name="w", weighting="wpo"), TermConfig(name="a", pairs="argmax", against="noise")]
)
def test_where_a_term_needs_statistics_of_the_head_no_term_is_in_the_kernel(term: TermConfig) -> None:
    batch = Batch(loss_of(TermConfig(), term))
    assert batch.program.in_kernel == () and batch.head_output().losses_F is None


def test_the_rewards_are_those_of_the_first_term_that_compares_answers() -> None:
    anchor = TermConfig(name="anchor", pairs="chosen")
    batch = Batch(loss_of(anchor, TermConfig(name="text"), beta=0.5))
    rewards = batch.output().rewards
    assert batch.program.main == 1 and batch.program.compares_answers
    assert (rewards.start, rewards.end) == (3, 6)
    expected = [0.5 * factor * batch.ratio(g, clean(better)).item() for g, better, _, _, factor in PAIRS]
    assert rewards.chosen_reward_P.tolist() == pytest.approx(expected, rel=1e-6)
    expected = [0.5 * factor * batch.ratio(g, clean(worse)).item() for g, _, worse, _, factor in PAIRS]
    assert rewards.rejected_reward_P is not None and rewards.rejected_reward_P.tolist() == pytest.approx(expected)
    expected = [-batch.logp(g, clean(better)).mean().item() for g, better, *_ in PAIRS]
    assert rewards.chosen_nll_P.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sft", "nll"])
def test_fine_tuning_has_no_rejected_side(name: str) -> None:
    batch = Batch(LossConfig(type=name))
    assert [cell for _, cell in batch.cells] == [clean(0), clean(0)]  # nor are rejected answers packed
    output = batch.output()
    assert not batch.program.compares_answers and batch.inputs.reference is None
    assert output.rewards.rejected_reward_P is None and output.rewards.rejected_logp_P is None
    total = sum(-weight * batch.logp(group, clean(k)).mean() for group, k, weight in CHOSEN)
    assert isinstance(total, Tensor)
    batch.assert_same(output.total, total)


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_without_a_reference(name: str) -> None:
    batch = Batch(loss_of(TermConfig(type=name), TermConfig(type="nll", weight=0.5), beta=2.0))
    assert batch.inputs.reference is None and not batch.program.needs_reference
    total = torch.zeros((), dtype=torch.float64)
    for group, better, worse, weight, factor in PAIRS:
        chosen_N, rejected_N = (batch.logp(group, clean(k)) for k in (better, worse))
        beta = 2.0 * factor
        if name == "cpo":
            margin = beta * (chosen_N.sum() - rejected_N.sum())
        elif name == "simpo":
            margin = beta * (chosen_N.mean() - rejected_N.mean()) - 0.5
        else:
            odds = [p / (1 - p) for p in (chosen_N.mean().exp(), rejected_N.mean().exp())]
            margin = torch.log(odds[0] / odds[1])
        total = total + weight * (softplus(-margin) - 0.5 * chosen_N.mean())
    output = batch.output()
    batch.assert_same(output.total, total)
    assert output.rewards.chosen_reward_P[2].item() == pytest.approx(
        2.0 * (batch.logp(1, clean(0)).sum() if name == "cpo" else batch.logp(1, clean(0)).mean()).item()
    )


def test_a_reference_that_another_term_needs_does_not_enter_a_loss_without_one() -> None:
    mixed = Batch(loss_of(TermConfig(type="simpo"), TermConfig(weight=0.0))).output()
    alone = Batch(LossConfig(type="simpo")).output()
    assert mixed.total.item() == pytest.approx(alone.total.item())
    assert mixed.rewards.chosen_reward_P.tolist() == pytest.approx(alone.rewards.chosen_reward_P.tolist())


PAIRWISE = [n for n, d in LOSSES.items() if d.function.__module__.startswith("bpo.") and not d.across_groups]


@pytest.mark.parametrize("name", sorted(n for n in PAIRWISE if LOSSES[n].reference and n != "margin_consistency"))
def test_at_the_reference_every_ratio_is_zero(name: str) -> None:
    smoothing = 0.1 if LOSSES[name].smoothing else 0.0
    batch = Batch(loss_of(TermConfig(type=name, label_smoothing=smoothing, pairs="text"), beta=0.5))
    zeros, betas = [0.0] * len(PAIRS), [0.5 * pair[4] for pair in PAIRS]
    weight_P = torch.tensor([pair[3] for pair in PAIRS], dtype=torch.float64)
    loss_P = weight_P * loss(name, pair_values(zeros, zeros, beta=betas, label_smoothing=smoothing))
    output = batch.program.at_reference(batch.head_output(), batch.inputs)
    assert output.loss_P.tolist() == pytest.approx(loss_P.tolist(), rel=1e-6)
    assert output.total.item() == pytest.approx(loss_P.sum().item(), rel=1e-6)
    assert not output.total.requires_grad
    if name in ("sigmoid", "sigmoid_norm", "spa", "robust"):
        assert output.total.item() == pytest.approx(sum(pair[3] for pair in PAIRS) * math.log(2))


def test_at_the_reference_cells_without_one_keep_the_policys_log_probs() -> None:
    terms = (
        TermConfig(guidance=2.0, guidance_view="noise", beta=0.5),
        TermConfig(type="nll", pairs="auxiliary", weight=0.25),
    )
    batch = Batch(loss_of(*terms))
    assert batch.inputs.has_reference_N is not None
    total = torch.zeros((), dtype=torch.float64)
    for group, better, worse, weight, factor in PAIRS:
        sides = [
            batch.reference(group, clean(k)).sum() - batch.logp(group, Cell("noise", k)).sum() for k in (better, worse)
        ]
        total = total + weight * softplus(-0.5 * factor * (sides[0] - sides[1]))
    for group, _, weight in CHOSEN:
        total = total - 0.25 * weight * batch.logp(group, Cell("auxiliary0", 0)).mean()
    output = batch.program.at_reference(batch.head_output(), batch.inputs)
    assert output.total.item() == pytest.approx(total.item(), rel=1e-6)


def test_a_state_is_constant_within_a_step_and_each_term_has_its_own() -> None:
    terms = (TermConfig(type="bco_pair", name="a"), TermConfig(type="bco_pair", name="b", beta=1.0), TermConfig())
    batch = Batch(loss_of(*terms, beta=0.5))
    output = batch.output()
    assert sorted(output.observed) == [0, 1] and sorted(batch.program.states) == ["a", "b"]
    rewards_PC = [[b * f * batch.ratio(g, clean(k)).item() for k in (i, j)] for g, i, j, _, f in PAIRS for b in [0.5]]
    torch.testing.assert_close(output.observed[0], torch.tensor(rewards_PC, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.observed[1], 2 * output.observed[0], rtol=1e-6, atol=0)
    assert not output.observed[0].requires_grad
    assert batch.output().total.item() == output.total.item()  # nothing was learned from the first evaluation
    batch.program.states["a"].update(output.observed[0].tolist())
    after = batch.output()
    assert after.term_sums_T[0] != output.term_sums_T[0]
    assert after.term_sums_T[1:].tolist() == output.term_sums_T[1:].tolist()


def test_the_margins_that_spa_collects() -> None:
    batch = Batch(LossConfig(type="spa", beta=0.5))
    output = batch.output()
    margins = [0.5 * f * (batch.ratio(g, clean(i)) - batch.ratio(g, clean(j))).item() for g, i, j, _, f in PAIRS]
    assert output.observed[0].tolist() == [[pytest.approx(margin)] for margin in margins]


def test_the_margins_that_spa_collects_of_log_probs_extrapolated_beyond_the_policy() -> None:
    """(1 + lambda) logits - lambda logits of the reference at the same rows, against the reference's log-probs."""
    beyond = TermConfig(type="spa", name="beyond", options={"extrapolation": 0.25})
    batch = Batch(loss_of(beyond, TermConfig(type="spa", name="plain"), beta=0.5))
    batch.program.plan_steps(10)
    assert batch.program.extrapolation == batch.program.request(batch.inputs).extrapolation == 0.25
    logits_NV = batch.hidden_NH.detach() @ batch.head.weight.detach().T
    mixed_NV = 1.25 * logits_NV - 0.25 * torch.randn(logits_NV.shape, generator=torch.Generator().manual_seed(7))
    logp_N = mixed_NV.log_softmax(1).gather(1, batch.target_N[:, None])[:, 0]
    head = replace(batch.head_output(), extrapolated_N=logp_N)
    output = batch.program.apply(head, batch.inputs)

    def ratio(group: int, completion: int) -> float:
        cell = clean(completion)
        return (logp_N[batch.tokens(group, cell)].sum() - batch.reference(group, cell).sum()).item()

    margins = [[0.5 * f * (ratio(g, i) - ratio(g, j))] for g, i, j, _, f in PAIRS]
    assert output.observed[0].tolist() == [[pytest.approx(margin)] for (margin,) in margins]
    plain = [0.5 * f * (batch.ratio(g, clean(i)) - batch.ratio(g, clean(j))).item() for g, i, j, _, f in PAIRS]
    assert output.observed[1].tolist() == [[pytest.approx(margin)] for margin in plain]
    assert output.term_sums_T[0] == output.term_sums_T[1]  # DPO before the first margin, both
    assert [state.total_steps for state in batch.program.states.values()] == [10, 10]  # type: ignore[attr-defined]


def test_a_term_across_groups_hands_over_its_values_and_counts_nothing_yet() -> None:
    batch = Batch(loss_of(TermConfig(type="rpo_diagonal", weight=0.7), TermConfig(weight=0.3), beta=0.5))
    output = batch.output()
    assert batch.program.couples_groups and not batch.program.needs_similarity
    assert output.term_sums_T[0] == 0 and not output.loss_P[:3].any()
    assert list(output.across) == [0]
    chosen_P = output.across[0].chosen_ratio_P
    assert chosen_P.requires_grad
    assert chosen_P.tolist() == pytest.approx([batch.ratio(g, clean(i)).item() for g, i, *_ in PAIRS])
    assert output.total.item() == pytest.approx(0.3 * output.term_sums_T[1].item())


def test_the_groups_of_this_file() -> None:
    """The constants above are what the data say."""
    batch = Batch(LossConfig(beta=1.0))
    index = [batch.cells.index((g, clean(k))) for g, i, j, *_ in PAIRS for k in (i, j)]
    assert batch.inputs.pairs_P2.flatten().tolist() == index
    assert batch.inputs.pair_weight_P.tolist() == [pair[3] for pair in PAIRS]
    assert batch.inputs.pair_beta_P.tolist() == [pair[4] for pair in PAIRS]
    assert len(GROUPS) == 2
