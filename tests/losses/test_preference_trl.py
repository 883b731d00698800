"""Every loss that TRL has, against TRL's own code: values and gradients.

Shape letters: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bpo.losses.registry import LOSSES
from bpo.losses.values import PairValues
from tests.losses.pairs import pair_values, with_defaults
from tests.losses.trl_values import TrlLoss, trl_cpo, trl_dpo, trl_orpo

pytest.importorskip("trl", reason="needs trl: pip install 'bpo[bench]'")

BETA = 0.3
LENGTHS = ((3, 5), (4, 2), (1, 6), (5, 5))
# TRL's alpha divergence is clamped by dtype, with no entry for fp64.
FP32_ONLY = {"alpha_divergence"}
SMOOTHED = {"exo_pair": 0.05, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
PAIRWISE = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop sft sigmoid_norm"
ALL = [*PAIRWISE.split(), "aot", "aot_unpaired"]


def answers(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-3 * torch.rand(length, generator=generator, dtype=dtype) for length in lengths]


def crafted(lengths: tuple[tuple[int, int], ...] = LENGTHS, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Token log-probs of the chosen and rejected answers, of the policy and then of the reference."""
    sides = [list(side) for side in zip(*lengths, strict=True)]
    return [answers(side, seed, dtype) for seed, side in enumerate([*sides, *sides])]


def ours(name: str, tokens: list[list[Tensor]], **fields: Any) -> TrlLoss:
    """Our loss of the same tokens, in the form of TRL's: the mean over pairs and its gradients."""
    leaves = [[answer.clone().requires_grad_() for answer in side] for side in tokens[:2]]
    reduced: Callable[[Tensor], Tensor] = torch.mean if LOSSES[name].length == "mean" else torch.sum
    sides = [torch.stack([reduced(answer) for answer in side]) for side in (*leaves, *tokens[2:])]
    values = replace(
        pair_values(*[side.detach() for side in sides], beta=BETA, dtype=sides[0].dtype),
        chosen_logp_P=sides[0],
        rejected_logp_P=sides[1],
        chosen_nll_P=torch.stack([-answer.mean() for answer in leaves[0]]),
        **fields,
    )
    loss = LOSSES[name].function(with_defaults(name, values)).mean()
    flat = [*leaves[0], *leaves[1]]
    found = torch.autograd.grad(loss, flat, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, flat, strict=True)]
    return TrlLoss(loss.item(), gradients[: len(leaves[0])], gradients[len(leaves[0]) :])


def assert_same(mine: TrlLoss, theirs: TrlLoss, rtol: float = 1e-6) -> None:
    # 1e-6: TRL converts label_smoothing to fp32 even where everything else is fp64.
    assert mine.loss == pytest.approx(theirs.loss, rel=rtol)
    for side in ("chosen_gradients", "rejected_gradients"):
        for left, right in zip(getattr(mine, side), getattr(theirs, side), strict=True):
            torch.testing.assert_close(left, right, rtol=rtol, atol=rtol * 1e-2)


def test_this_file_compares_all_losses_that_trl_has() -> None:
    from trl import DPOConfig

    help_text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert {name for name in ALL if f"'{name}'" not in help_text} == set()
    assert help_text.split("Possible values are:")[1].split(". ")[0].count("'") == 2 * len(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_step_of_several_pairs_equals_trls(name: str) -> None:
    # TRL's sft is a mean over all tokens of the batch, ours over pairs of a mean over tokens.
    lengths = LENGTHS if name != "sft" else tuple((3, rejected) for _, rejected in LENGTHS)
    tokens, smoothing = crafted(lengths), SMOOTHED.get(name, 0.0)
    theirs = trl_dpo(*tokens, loss_type=name, beta=BETA, label_smoothing=smoothing)
    assert_same(ours(name, tokens, label_smoothing=smoothing), theirs)


@pytest.mark.parametrize("name", PAIRWISE.split())
def test_each_pair_alone_equals_trls(name: str) -> None:
    for lengths in LENGTHS:
        tokens, smoothing = crafted((lengths,)), SMOOTHED.get(name, 0.0)
        theirs = trl_dpo(*tokens, loss_type=name, beta=BETA, label_smoothing=smoothing)
        assert_same(ours(name, tokens, label_smoothing=smoothing), theirs)


@pytest.mark.parametrize("tau", [0.02, 0.7])
def test_discopop_takes_the_same_temperature(tau: float) -> None:
    tokens = crafted()
    assert_same(
        ours("discopop", tokens, options={"tau": tau}),
        trl_dpo(*tokens, loss_type="discopop", beta=BETA, discopop_tau=tau),
    )


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop"])
@pytest.mark.parametrize(
    ("divergence", "alpha", "theirs", "coefficient"),
    [
        ("forward_kl", 0.5, "forward_kl", 0.5),
        ("js", 0.5, "js_divergence", 0.5),
        # TRL's coefficient is 1 - alpha; 0 is the forward KL divergence, 1 the reverse one.
        ("alpha", 0.5, "alpha_divergence", 0.5),
        ("alpha", 0.9, "alpha_divergence", 0.1),
        ("alpha", 1e-7, "alpha_divergence", 1.0),
    ],
)
def test_rewards_of_other_divergences_equal_trls(
    name: str, divergence: str, alpha: float, theirs: str, coefficient: float
) -> None:
    exact = theirs not in FP32_ONLY
    tokens = crafted(dtype=torch.float64 if exact else torch.float32)
    smoothing = SMOOTHED.get(name, 0.0)
    expected = trl_dpo(
        *tokens,
        loss_type=name,
        beta=BETA,
        label_smoothing=smoothing,
        f_divergence_type=theirs,
        f_alpha_divergence_coef=coefficient,
    )
    mine = ours(name, tokens, label_smoothing=smoothing, divergence=divergence, divergence_alpha=alpha)
    assert_same(mine, expected, rtol=1e-6 if exact else 1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("name", "theirs"), [("cpo", "sigmoid"), ("simpo", "simpo")])
def test_reference_free_losses_equal_those_of_trls_cpo_trainer(name: str, theirs: str, smoothing: float) -> None:
    options = {"gamma": 0.8} if name == "simpo" else {}
    values = pair_values([-1.0, -2.5, -0.3], [-2.0, -0.5, -0.4], beta=BETA, label_smoothing=smoothing, options=options)
    expected_P = trl_cpo(
        values.chosen_logp_P,
        values.rejected_logp_P,
        loss_type=theirs,
        beta=BETA,
        label_smoothing=smoothing,
        simpo_gamma=0.8,
    )
    _assert_same_pairs(name, values, expected_P, rtol=1e-12)


def test_simpos_default_margin_is_trls() -> None:
    from trl.experimental.cpo import CPOConfig

    assert LOSSES["simpo"].options["gamma"] == CPOConfig.__dataclass_fields__["simpo_gamma"].default


def test_orpo_equals_trls_odds_ratio_loss() -> None:
    values = pair_values([-1.0, -2.5, -0.01, -30.0], [-2.0, -0.5, -0.4, -0.1])
    expected_P = trl_orpo(values.chosen_logp_P, values.rejected_logp_P)
    _assert_same_pairs("orpo", values, expected_P, rtol=1e-5)  # TRL computes in fp32


def _assert_same_pairs(name: str, values: PairValues, expected_P: Tensor, rtol: float) -> None:
    loss_P = LOSSES[name].function(with_defaults(name, values))
    torch.testing.assert_close(loss_P, expected_P, rtol=rtol, atol=0, check_dtype=False)
    sides = (values.chosen_logp_P, values.rejected_logp_P)
    mine, theirs = torch.autograd.grad(loss_P.sum(), sides), torch.autograd.grad(expected_P.sum(), sides)
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=0)


def test_the_helper_gives_trls_ld_dpo_and_wpo() -> None:
    """Worked by hand: the shorter answer's length counts fully; weights are the mean aligned probabilities."""
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5])
    zeros = [torch.zeros(3)], [torch.zeros(1)]
    shortened = trl_dpo([chosen], [rejected], *zeros, beta=1.0, ld_alpha=0.25)
    margin = (-1.0 + 0.25 * -5.0) - -0.5
    assert shortened.loss == pytest.approx(torch.tensor(-margin).exp().log1p().item())
    squares = {"chosen_log_sum_sq": [torch.tensor([-0.5, -0.5, -2.0])], "rejected_log_sum_sq": [torch.tensor([-0.4])]}
    weighted = trl_dpo([chosen], [rejected], *zeros, beta=1.0, **squares)
    plain = trl_dpo([chosen], [rejected], *zeros, beta=1.0)
    weight = torch.tensor((-0.5 - 1.5 - 1.0) / 3 + -0.1).exp().item()
    assert weighted.loss == pytest.approx(weight * plain.loss)
    torch.testing.assert_close(weighted.chosen_gradients[0], weight * plain.chosen_gradients[0])
