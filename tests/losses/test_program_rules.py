"""What terms make of log-probs before their loss: token weights, weights of pairs, guidance, second targets.

Shape letters: N response tokens (with second targets), P pairs, V vocabulary, M second targets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.data.cells import Cell
from bpo.data.encode import EncodedGroup
from bpo.losses.program import HeadOutput
from tests.losses.batches import GROUPS, PROMPT, Batch, views_of
from tests.losses.trl_values import TrlLoss, trl_dpo

VIEWS = {"crop": ViewConfig(type="crop"), "noise": ViewConfig(type="noise"), "other": ViewConfig(type="other")}
BETA = 0.3
# One pair per group with answers of these lengths; no two answers have a token in common.
LENGTHS = ((3, 5), (4, 2), (1, 6), (5, 5))
PAIRS_OF_LENGTHS = tuple(
    EncodedGroup(PROMPT, (tuple(range(10, 10 + chosen)), tuple(range(20, 20 + rejected))), (1.0, 0.0))
    for chosen, rejected in LENGTHS
)
CHOSEN, REJECTED = Cell("", 0), Cell("", 1)


def batch_of(*groups: EncodedGroup, loss: LossConfig | None = None, seed: int = 0, **term: Any) -> Batch:
    """A batch of one term, or of a loss."""
    loss = loss or LossConfig(beta=BETA, terms=[TermConfig(**term)], views=VIEWS)
    return Batch(loss, groups or PAIRS_OF_LENGTHS, seed=seed)


def answers(batch: Batch, values_N: Tensor, cell: Cell) -> list[Tensor]:
    """Values of the tokens of one answer of each group."""
    return [values_N[batch.tokens(group, cell)] for group in range(len(LENGTHS))]


def ours(batch: Batch, logp_N: Tensor, collision_N: Tensor | None = None) -> TrlLoss:
    """The mean over the pairs and its gradients by the log-probs, as TRL's."""
    leaf_N = logp_N.detach().clone().requires_grad_()
    loss = batch.program.apply(HeadOutput(None, leaf_N, collision_N), batch.inputs).total / len(LENGTHS)
    (gradient_N,) = torch.autograd.grad(loss, leaf_N)
    return TrlLoss(loss.item(), answers(batch, gradient_N, CHOSEN), answers(batch, gradient_N, REJECTED))


def assert_trls(mine: TrlLoss, theirs: TrlLoss) -> None:
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)  # beta is collated in fp32
    for side in ("chosen_gradients", "rejected_gradients"):
        for left, right in zip(getattr(mine, side), getattr(theirs, side), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)


def crafted(batch: Batch) -> tuple[Tensor, list[list[Tensor]]]:
    """log pi [N], and as TRL takes them: policy and reference, of the preferred and the dispreferred answers."""
    logp_N = -3 * torch.rand(len(batch.target_N), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert batch.inputs.reference is not None
    sides = [answers(batch, of, cell) for of in (logp_N, batch.inputs.reference) for cell in (CHOSEN, REJECTED)]
    return logp_N, sides


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "apo_zero"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_ld_dpo_equals_trls(name: str, alpha: float) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install 'bpo[bench]'")
    batch = batch_of(type=name, ld_alpha=alpha)
    logp_N, sides = crafted(batch)
    assert_trls(ours(batch, logp_N), trl_dpo(*sides, loss_type=name, beta=BETA, ld_alpha=alpha))


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair"])
def test_wpo_equals_trls(name: str) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install 'bpo[bench]'")
    batch = batch_of(type=name, weighting="wpo")
    logp_N, sides = crafted(batch)
    # Nearly one likely token at each place: log sum_v p_v^2 is close to 0, and no weight above 1.
    collision_N = 0.1 * logp_N - 0.01
    collisions = [answers(batch, collision_N, cell) for cell in (CHOSEN, REJECTED)]
    squares = {"chosen_log_sum_sq": collisions[0], "rejected_log_sum_sq": collisions[1]}
    assert_trls(ours(batch, logp_N, collision_N), trl_dpo(*sides, loss_type=name, beta=BETA, **squares))


def aligned(batch: Batch, group: int, cell: Cell) -> Tensor:
    """Mean of log pi(y_t) - log sum_v pi(v)^2, written out; without gradient."""
    probabilities_NV = batch.logits(group, replace(cell, argmax_of=None)).softmax(1)
    return (batch.logp(group, cell) - probabilities_NV.square().sum(1).log()).mean().detach()


@pytest.mark.parametrize("pairs", ["text", "chosen", "argmax"])
def test_wpo_from_the_head_written_out(pairs: str) -> None:
    """Second targets are as likely as the rows say that score them; an anchor has weight 1."""
    groups = [replace(group, views=views_of("noise")) for group in PAIRS_OF_LENGTHS]
    against = {"against": "noise"} if pairs == "argmax" else {}
    batch = batch_of(*groups, weighting="wpo", pairs=pairs, **against)
    total = torch.zeros((), dtype=torch.float64)
    weights = []
    for group in range(len(LENGTHS)):
        rejected = {"text": REJECTED, "chosen": None, "argmax": Cell("", 0, argmax_of="noise")}[pairs]
        logits = aligned(batch, group, CHOSEN) + (0.0 if rejected is None else aligned(batch, group, rejected))
        margin = batch.ratio(group, CHOSEN) - (0.0 if rejected is None else batch.ratio(group, rejected))
        weights.append(logits.exp().clamp(max=1).item())
        total = total + weights[-1] * softplus(-BETA * margin)
    assert len(set(weights)) == len(LENGTHS)
    batch.assert_same(batch.output().total, total)


def test_a_weight_of_wpo_is_at_most_one() -> None:
    batch = batch_of(weighting="wpo")
    logp_N, _ = crafted(batch)
    weighted = ours(batch, logp_N, torch.full_like(logp_N, -50.0))
    assert weighted.loss == pytest.approx(ours(batch_of(), logp_N).loss)


def with_equal_answers(seed: int = 0, **term: Any) -> Batch:
    group = EncodedGroup(PROMPT, ((10, 11, 12), (10, 11, 12)), (1.0, 0.0))
    batch = batch_of(group, token_weights="changed", seed=seed, **term)
    with torch.no_grad():  # equal answers to one prompt have equal hidden states, and an equal reference
        batch.hidden_NH[batch.tokens(0, REJECTED)] = batch.hidden_NH[batch.tokens(0, CHOSEN)]
        assert batch.inputs.reference is not None
        batch.inputs.reference[batch.tokens(0, REJECTED)] = batch.inputs.reference[batch.tokens(0, CHOSEN)]
    return batch


def test_selms_gradient_is_dpos_and_alpha_beta_by_the_log_prob_of_the_references_own_answer() -> None:
    """By the mean over pairs: the explored answers of a group count as its pairs."""
    alpha, beta = 0.01, 0.3
    scores = {"scores": (1.0, 0.0, 0.5), "paired": (True, True, False)}
    answers = ((10, 11), (20,), (30, 31, 32))
    groups = (
        EncodedGroup(PROMPT, answers, explored=(False, False, True), **scores),  # y_r in no pair
        EncodedGroup(PROMPT, answers[:2], (1.0, 0.0), explored=(False, True)),  # y_r is y_l
        EncodedGroup(PROMPT, answers[:2], (1.0, 0.0)),
    )

    def gradient(weight: float) -> tuple[Batch, list[float]]:
        optimism = TermConfig(type="log_ratio", name="optimism", pairs="explored", weight=weight)
        batch = Batch(LossConfig(beta=beta, terms=[TermConfig(), optimism]), groups)
        logp_N = batch.head(batch.hidden_NH, batch.target_N).detach().requires_grad_()
        output = batch.program.apply(HeadOutput(None, logp_N), batch.inputs)
        expected = beta * (batch.ratio(0, Cell("", 2)) + batch.ratio(1, Cell("", 1)))
        assert output.term_sums_T[1].item() == pytest.approx(expected.item(), rel=1e-6)
        deltas = [beta * (batch.ratio(g, CHOSEN) - batch.ratio(g, REJECTED)) for g in range(len(groups))]
        dpo = sum(softplus(-delta) for delta in deltas)
        assert output.total.item() == pytest.approx((dpo + weight * expected).item(), rel=1e-6)
        (by_token_N,) = torch.autograd.grad(output.total / len(groups), logp_N)
        return batch, by_token_N.tolist()

    batch, selm = gradient(alpha)
    difference = [a - b for a, b in zip(selm, gradient(0.0)[1], strict=True)]
    explored = [
        number in (2, 4) for number in range(len(batch.cells)) for _ in range(*batch.starts[number : number + 2])
    ]
    expected = [alpha * beta / len(groups) if of_answer else 0.0 for of_answer in explored]
    assert difference == pytest.approx(expected, rel=1e-6, abs=1e-15) and sum(explored) == 4


@pytest.mark.parametrize("length", ["sum", "mean"])
def test_equal_answers_have_the_loss_log_2(length: str) -> None:
    batch = with_equal_answers(length=length)
    assert batch.output().total.item() == pytest.approx(math.log(2), abs=1e-12)


def test_changed_tokens_that_weigh_1_are_dpo() -> None:
    group = EncodedGroup(PROMPT, ((10, 11, 12), (10, 21, 12, 13)), (1.0, 0.0))
    weighed = batch_of(group, token_weights="changed", options={"gamma": 1.0})
    plain = batch_of(group)
    assert weighed.program.in_kernel == () and plain.program.in_kernel == (0,)
    plain.hidden_NH, plain.head = weighed.hidden_NH, weighed.head
    weighed.assert_same(weighed.output().total, plain.output().total, rtol=1e-9)


def test_changed_tokens_written_out() -> None:
    """RLHF-V, arXiv 2312.00849 eq. 3: 5 for a changed token, divided by the sum of the weights."""
    group = EncodedGroup(PROMPT, ((10, 11, 12), (10, 21, 12, 13)), (1.0, 0.0))
    batch = batch_of(group, token_weights="changed", length="mean")

    def side(cell: Cell, weights: list[float]) -> Tensor:
        weight_N = torch.tensor(weights, dtype=torch.float64)
        return (weight_N * (batch.logp(0, cell) - batch.reference(0, cell))).sum() / weight_N.sum()

    margin = side(CHOSEN, [1, 5, 1]) - side(REJECTED, [1, 5, 1, 5])
    batch.assert_same(batch.output().total, softplus(-BETA * margin))


def test_each_term_has_its_own_token_weights() -> None:
    groups = [
        replace(group, token_weights=((2.0,) * chosen, (0.5,) * rejected))
        for group, (chosen, rejected) in zip(PAIRS_OF_LENGTHS, LENGTHS, strict=True)
    ]
    terms = [
        TermConfig(weight=0.3),
        TermConfig(name="data", token_weights="data"),
        TermConfig(name="tail", ld_alpha=0.5, weight=2.0),
    ]
    batch = batch_of(*groups, loss=LossConfig(beta=BETA, terms=terms))
    total = torch.zeros((), dtype=torch.float64)
    for group, lengths in enumerate(LENGTHS):
        chosen, rejected = batch.ratio(group, CHOSEN), batch.ratio(group, REJECTED)
        total = total + 0.3 * softplus(-BETA * (chosen - rejected)) + softplus(-BETA * (2.0 * chosen - 0.5 * rejected))
        kept = []
        for cell in (CHOSEN, REJECTED):
            ratio_N = batch.logp(group, cell) - batch.reference(group, cell)
            kept.append(ratio_N[: min(lengths)].sum() + 0.5 * ratio_N[min(lengths) :].sum())
        total = total + 2.0 * softplus(-BETA * (kept[0] - kept[1]))
    assert batch.program.in_kernel == (0,)
    batch.assert_same(batch.output().total, total)


def test_a_batch_without_a_pair_of_the_term_that_weighs_tokens() -> None:
    """Groups without an answer to the other image have none."""
    groups = [replace(group, views=views_of("other")) for group in PAIRS_OF_LENGTHS]
    term = TermConfig(name="other", pairs="other", against="other", token_weights="data")
    batch = batch_of(*groups, loss=LossConfig(beta=BETA, terms=[TermConfig(), term], views=VIEWS))
    assert batch.inputs.pairs_of_term == (len(LENGTHS), 0) and batch.inputs.weighed is None
    output = batch.output()
    assert output.term_sums_T[1] == 0
    assert output.total.item() == output.term_sums_T[0].item()


def guided(guidance: float) -> Batch:
    groups = [replace(group, views=views_of("noise")) for group in PAIRS_OF_LENGTHS]
    return batch_of(*groups, guidance=guidance, guidance_view="noise")


def test_guidance_written_out_with_a_constant_guiding_pass() -> None:
    """V-DPO, arXiv 2411.02712: g log p(y | image) - (g - 1) log p(y | no image) in place of the policy's log-prob."""
    batch = guided(2.0)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(len(LENGTHS)):
        sides = []
        for k in (0, 1):
            guiding = batch.logp(group, Cell("noise", k)).sum().detach()
            sides.append(2 * batch.logp(group, Cell("", k)).sum() - guiding - batch.reference(group, Cell("", k)).sum())
        total = total + softplus(-BETA * (sides[0] - sides[1]))
    output = batch.output()
    batch.assert_same(output.total, total)
    by_hidden_NH, _ = batch.gradients(output.total)
    guiding_rows = [by_hidden_NH[batch.tokens(g, Cell("noise", k))] for g in range(len(LENGTHS)) for k in (0, 1)]
    assert not torch.cat(guiding_rows).any() and by_hidden_NH.any()


def test_guidance_near_1_is_dpo() -> None:
    batch = guided(1 + 1e-10)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(len(LENGTHS)):
        total = total + softplus(-BETA * (batch.ratio(group, CHOSEN) - batch.ratio(group, REJECTED)))
    batch.assert_same(batch.output().total, total)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_a_divergence_of_a_term_written_out(divergence: str) -> None:
    """arXiv 2309.16240: the reward is f'(u), u = pi / pi_ref of a side."""
    options = {"divergence_alpha": 0.3} if divergence == "alpha" else {}
    batch = batch_of(type="hinge", divergence=divergence, **options)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(len(LENGTHS)):
        u = [batch.ratio(group, cell).exp() for cell in (CHOSEN, REJECTED)]
        reward = {
            "forward_kl": [-1 / one for one in u],
            "js": [torch.log(2 * one / (1 + one)) for one in u],
            "alpha": [(1 - one**-0.3) / 0.3 for one in u],
        }[divergence]
        total = total + torch.relu(1 - BETA * (reward[0] - reward[1]))
    assert batch.program.in_kernel == ()
    batch.assert_same(batch.output().total, total)


def test_second_targets_written_out() -> None:
    """POVID, arXiv 2402.11411: the preferred answer against the likeliest tokens under noise at its own rows."""
    terms = [TermConfig(weight=0.5), TermConfig(name="noise", pairs="argmax", against="noise", weight=0.5, beta=0.7)]
    batch = batch_of(*GROUPS, loss=LossConfig(beta=0.2, terms=terms, views=VIEWS))
    second = Cell("", 0, argmax_of="noise")
    total = torch.zeros((), dtype=torch.float64)
    for group, rejected, weight, factor in ((0, 1, 1.0, 0.5), (0, 2, 2.0, 2.0), (1, 1, 1.0, 1.0)):
        chosen = batch.ratio(group, CHOSEN)
        text = softplus(-0.2 * factor * (chosen - batch.ratio(group, Cell("", rejected))))
        noise = softplus(-0.7 * factor * (chosen - batch.ratio(group, second)))
        total = total + 0.5 * weight * (text + noise)
    output = batch.output()
    batch.assert_same(output.total, total)
    expected_M = torch.cat([batch.logp(group, second) for group in range(2)])
    torch.testing.assert_close(output.logp_N[len(batch.target_N) :], expected_M.detach())
    # The choice of a token has no gradient: the rows under noise have none.
    by_hidden_NH, _ = batch.gradients(output.total)
    assert not torch.cat([by_hidden_NH[batch.tokens(group, Cell("noise", 0))] for group in range(2)]).any()


def test_second_targets_that_are_shared_are_the_references_tokens() -> None:
    term = TermConfig(pairs="argmax", against="noise", shared_tokens=True)
    batch = batch_of(*GROUPS, loss=LossConfig(beta=0.2, terms=[term], views=VIEWS))
    assert batch.program.shares_second_tokens and {cell.view for _, cell in batch.cells} == {""}
    second = batch.inputs.second
    assert second is not None
    token_M = torch.arange(len(second.base_M)) + 33
    batch.inputs = replace(batch.inputs, second=replace(second, token_M=token_M))
    logits_MV = batch.hidden_NH[second.base_M] @ batch.head.weight.T
    expected_M = logits_MV.log_softmax(1).gather(1, token_M[:, None])[:, 0]
    head = batch.head_output()
    assert head.second_M is not None and head.second_M.tolist() == token_M.tolist()
    batch.assert_same(head.logp_N[len(batch.target_N) :].sum(), expected_M.sum(), rtol=1e-9)
