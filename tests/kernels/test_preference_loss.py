"""The preference loss.

Legend: N tokens, K completions, P pairs.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bpo_kernels import dispatch
from tests.pairwise import pairwise

PAIRS = [(0, 1), (0, 2), (3, 1), (4, 0), (5, 3)]
LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.0), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)]


def by_the_paper(
    policy_N, reference_N, completion_N, pairs_P2, beta, eps, loss_type, weight_N=None, beta_P=None, weight_P=None
) -> Tensor:
    """Each loss as in its paper, from dense sums; the ratio of the anchor, -1, is 0."""
    log_ratio_N = (policy_N - reference_N) * (1 if weight_N is None else weight_N)
    ratio = {k: log_ratio_N[completion_N == k].sum() for k in pairs_P2.flatten().tolist() if k >= 0} | {-1: 0.0}
    losses, common = [], beta
    for pair, (chosen, rejected) in enumerate(pairs_P2.tolist()):
        beta = common * (1 if beta_P is None else beta_P[pair].item())
        margin = ratio[chosen] - ratio[rejected] + policy_N.sum() * 0  # a tensor for two anchors, too
        won, lost = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses.append(
            {
                "sigmoid": -(1 - eps) * won - eps * lost,
                "robust": (-(1 - eps) * won + eps * lost) / (1 - 2 * eps),
                "hinge": torch.relu(1 - beta * margin),
                "ipo": (margin - 1 / (2 * beta)) ** 2,
            }[loss_type]
        )
    return torch.stack(losses) * (1 if weight_P is None else weight_P)


def problem(num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Policy, reference, completions in no order, pairs that share completions, weights."""
    policy_N = -torch.rand(num_tokens, device=device)
    reference_N = -torch.rand(num_tokens, device=device)
    completion_N = torch.randint(6, (num_tokens,), device=device)
    return (
        policy_N,
        reference_N,
        completion_N,
        torch.tensor(PAIRS, device=device),
        torch.rand(num_tokens, device=device),
    )


@pytest.mark.parametrize(
    *pairwise(path=["few", "many"], loss=LOSSES, weighted=[False, True], num_tokens=[1, 700, 2500]),
    indirect=["path"],
    ids=str,
)
def test_losses_and_gradient_are_as_exact_as_eager(assert_as_exact_as_eager, device, path, loss, weighted, num_tokens):
    loss_type, eps = loss
    policy_N, reference_N, completion_N, pairs_P2, weight_N = problem(num_tokens, device)
    weight = weight_N if weighted else None
    assert_as_exact_as_eager(
        lambda policy: dispatch.preference_loss(
            policy, reference_N, completion_N, pairs_P2, 0.1, eps, loss_type, weight
        )[0],
        lambda policy: by_the_paper(policy, reference_N, completion_N, pairs_P2, 0.1, eps, loss_type, weight),
        [policy_N.requires_grad_()],
        torch.randn(len(PAIRS), device=device),
    )


# Completions 0 to 5 on either side of the anchor, the anchor on both sides, and a pair without one.
ANCHORED = [(0, -1), (-1, 1), (-1, -1), (2, 3), (4, -1), (-1, 5), (0, 5)]


@pytest.mark.parametrize(
    *pairwise(
        path=["few", "many"],
        loss=LOSSES,
        with_starts=[True, False],
        factors=["both", "beta", "weight", "neither"],
        weighted=[False, True],
        num_tokens=[1, 700],
    ),
    indirect=["path"],
    ids=str,
)
def test_pairs_with_their_own_beta_and_weight_and_anchors(
    assert_as_exact_as_eager, device, path, loss, with_starts, factors, weighted, num_tokens
):
    loss_type, eps = loss
    policy_N, reference_N, completion_N, _, weight_N = problem(num_tokens, device)
    completion_N = completion_N.sort().values
    starts_K1 = torch.searchsorted(completion_N, torch.arange(7, device=device)) if with_starts else None
    pairs_P2 = torch.tensor(ANCHORED, device=device)
    beta_P = 0.5 + torch.rand(len(ANCHORED), device=device) if factors in ("both", "beta") else None
    weight_P = torch.rand(len(ANCHORED), device=device) if factors in ("both", "weight") else None
    weight = weight_N if weighted else None
    constants = (reference_N, completion_N, pairs_P2, 0.1, eps, loss_type, weight)
    assert_as_exact_as_eager(
        lambda policy: dispatch.preference_loss(
            policy, *constants, completion_starts_K1=starts_K1, pair_beta_P=beta_P, pair_weight_P=weight_P
        )[0],
        lambda policy: by_the_paper(policy, *constants, beta_P, weight_P),
        [policy_N.requires_grad_()],
        torch.randn(len(ANCHORED), device=device),
    )


@pytest.mark.parametrize("with_starts", [True, False], ids=["offsets", "no-offsets"])
def test_an_anchor_has_no_reward_and_its_pairs_reward_is_not_weighted(device, path, with_starts):
    policy_N = torch.tensor([3.0, 1.0, 2.0], device=device)
    completion_N = torch.tensor([0, 0, 1], device=device)
    starts_K1 = torch.tensor([0, 2, 3], device=device) if with_starts else None
    losses_P, chosen_P, rejected_P = dispatch.preference_loss(
        policy_N,
        torch.zeros(3, device=device),
        completion_N,
        torch.tensor([[0, -1], [-1, 1], [-1, -1]], device=device),
        0.5,
        loss_type="hinge",
        completion_starts_K1=starts_K1,
        pair_beta_P=torch.tensor([1.0, 3.0, 1.0], device=device),
        pair_weight_P=torch.tensor([5.0, 0.25, 2.0], device=device),
    )
    assert chosen_P.tolist() == [2.0, 0.0, 0.0]
    assert rejected_P.tolist() == [0.0, 3.0, 0.0]
    assert losses_P.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_a_pair_of_weight_0_counts_for_nothing(device, path, loss_type):
    policy_N, reference_N, completion_N, pairs_P2, _ = problem(300, device)
    weight_P = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0], device=device)
    kept = weight_P > 0
    rest = (0.1, 0.0, loss_type)
    policy_N.requires_grad_()
    losses_P, _, _ = dispatch.preference_loss(
        policy_N, reference_N, completion_N, pairs_P2, *rest, pair_weight_P=weight_P
    )
    assert losses_P[~kept].tolist() == [0.0] * 3 and (losses_P[kept] != 0).all()
    (grad_N,) = torch.autograd.grad(losses_P.sum(), policy_N)
    unnamed_N = ~torch.isin(completion_N, pairs_P2[kept])
    assert unnamed_N.any() and not grad_N[unnamed_N].any()
    alone_P, _, _ = dispatch.preference_loss(
        policy_N, reference_N, completion_N, pairs_P2[kept], *rest, pair_weight_P=weight_P[kept]
    )
    assert torch.equal(alone_P, losses_P[kept])
    torch.testing.assert_close(grad_N, torch.autograd.grad(alone_P.sum(), policy_N)[0])


def test_factors_are_constants_in_any_float_type_and_layout(device, path):
    policy_N, reference_N, completion_N, pairs_P2, _ = problem(300, device)
    factors = torch.tensor([[0.5, 2.0, 1.0, 4.0, 1.0], [1.0, 0.5, 0.0, 2.0, 3.0]], device=device)
    rest = (reference_N, completion_N, pairs_P2, 0.1)
    expected_P, *_ = dispatch.preference_loss(policy_N, *rest, pair_beta_P=factors[0], pair_weight_P=factors[1])
    apart = torch.stack([factors, factors], dim=-1)[..., 0].requires_grad_()
    policy_N.requires_grad_()
    losses_P, *_ = dispatch.preference_loss(policy_N, *rest, pair_beta_P=apart[0], pair_weight_P=apart[1])
    assert torch.equal(losses_P, expected_P)
    losses_P.sum().backward()
    assert policy_N.grad is not None and apart.grad is None
    half = factors.to(torch.bfloat16)
    halves_P, *_ = dispatch.preference_loss(policy_N, *rest, pair_beta_P=half[0], pair_weight_P=half[1])
    assert torch.equal(halves_P, expected_P)


def test_sorted_tokens_do_not_make_a_completion_of_the_anchor(device, on_triton):
    """On CUDA indices are not checked: even tokens of completion -1 do not count for the anchor, nor get a gradient."""
    if not on_triton:
        pytest.skip("plain PyTorch refuses such tokens on a CPU")
    from bpo_kernels import preference_loss

    policy_N, completion_N = torch.ones(4, device=device), torch.tensor([-1, 0, -1, 0], device=device)
    pairs_P2 = torch.tensor([[0, -1], [-1, 0]], device=device)
    loss = (torch.zeros(4, device=device), completion_N, pairs_P2, None, None, None, None, 0.5, 0.0, "hinge")
    losses_P, chosen_P, rejected_P, derivative_P = preference_loss.forward(policy_N, *loss)
    assert (chosen_P.tolist(), rejected_P.tolist(), losses_P.tolist()) == ([1.0, 0.0], [0.0, 1.0], [0.0, 2.0])
    grads = (torch.ones(2, device=device), derivative_P, policy_N, completion_N, pairs_P2, None, None)
    assert preference_loss.backward(*grads).tolist() == [0.0, 0.5, 0.0, 0.5]


def test_all_pairs_of_many_completions(assert_as_exact_as_eager, device):
    """105 pairs of 15 completions: nearly the limit of the direct backward, and each completion in 14 of them."""
    pairs_P2 = torch.combinations(torch.arange(15, device=device))
    policy_N, reference_N = -torch.rand(300, device=device), -torch.rand(300, device=device)
    completion_N = torch.arange(300, device=device) // 20
    assert_as_exact_as_eager(
        lambda policy: dispatch.preference_loss(policy, reference_N, completion_N, pairs_P2, 0.1)[0],
        lambda policy: by_the_paper(policy, reference_N, completion_N, pairs_P2, 0.1, 0.0, "sigmoid"),
        [policy_N.requires_grad_()],
        torch.randn(105, device=device),
    )


@pytest.mark.parametrize(*pairwise(beta=[0.1, 0.3], eps=[0.0, 0.1, 0.3], loss_type=["sigmoid", "robust"]))
def test_policy_equal_to_reference_gives_log_2_to_the_bit(device, loss_type, eps, beta):
    policy_N, _, completion_N, pairs_P2, weight_N = problem(500, device)
    losses_P, *rewards = dispatch.preference_loss(
        policy_N, policy_N.clone(), completion_N, pairs_P2, beta, eps, loss_type, weight_N
    )
    assert losses_P.tolist() == [torch.tensor(math.log(2)).item()] * len(PAIRS)
    assert all((reward_P == 0).all() for reward_P in rewards)


def test_rewards_are_beta_times_log_ratio_without_gradient(device):
    policy_N, reference_N, completion_N, pairs_P2, _ = problem(500, device)
    policy_N.requires_grad_()
    reference_N.requires_grad_()
    losses_P, chosen_P, rejected_P = dispatch.preference_loss(policy_N, reference_N, completion_N, pairs_P2, 0.3)
    ratio_N = (policy_N - reference_N).detach().double()
    for reward_P, side in ((chosen_P, 0), (rejected_P, 1)):
        expected = [0.3 * float(ratio_N[completion_N == k].sum()) for k in pairs_P2[:, side].tolist()]
        assert reward_P.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert not reward_P.requires_grad
    assert chosen_P[0] == chosen_P[1], "one completion in two pairs has one reward"
    losses_P.sum().backward()
    assert policy_N.grad is not None
    assert reference_N.grad is None, "the reference is a constant"


def test_extreme_margins_stay_finite(device):
    completion_N = torch.tensor([0, 1], device=device)
    pairs_P2 = torch.tensor([[0, 1], [1, 0]], device=device)
    policy_N = torch.tensor([1e4, -1e4], device=device, requires_grad=True)
    losses_P, _, _ = dispatch.preference_loss(policy_N, torch.zeros(2, device=device), completion_N, pairs_P2, 0.5)
    assert losses_P.tolist() == [0.0, 1e4]
    losses_P.sum().backward()
    assert policy_N.grad.tolist() == [0.5, -0.5]


def test_small_losses_keep_their_digits(device):
    """At a margin of 20 the loss is 2e-9: log(1 + exp(-20)) in fp32 would be 0."""
    policy_N = torch.tensor([20.0, 0.0], device=device)
    completion_N, pairs_P2 = torch.tensor([0, 1], device=device), torch.tensor([[0, 1]], device=device)
    losses_P, _, _ = dispatch.preference_loss(policy_N, torch.zeros(2, device=device), completion_N, pairs_P2, 1.0)
    assert losses_P.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)


def test_no_pairs_no_tokens_and_empty_completions(device):
    policy_N = torch.zeros(3, device=device, requires_grad=True)
    completion_N = torch.zeros(3, dtype=torch.int64, device=device)
    no_pairs = torch.zeros(0, 2, dtype=torch.int64, device=device)
    losses_P, *rewards = dispatch.preference_loss(policy_N, policy_N.detach(), completion_N, no_pairs, 0.1)
    assert [tensor.shape for tensor in (losses_P, *rewards)] == [(0,)] * 3
    losses_P.sum().backward()
    assert policy_N.grad.tolist() == [0.0, 0.0, 0.0]
    nothing_N = torch.zeros(0, device=device, requires_grad=True)
    one_pair = torch.tensor([[0, 1]], device=device)
    losses_P, _, _ = dispatch.preference_loss(nothing_N, nothing_N.detach(), completion_N[:0], one_pair, 0.1)
    assert losses_P.item() == torch.tensor(math.log(2)).item()
    losses_P.sum().backward()
    assert nothing_N.grad.shape == (0,)


def test_same_bits_twice_and_unaligned_or_strided_inputs(device):
    policy_N, reference_N, completion_N, pairs_P2, weight_N = problem(1501, device)

    def run(policy_N: Tensor, *rest: Tensor) -> list[Tensor]:
        policy_N = policy_N.detach().requires_grad_()
        losses_P, chosen_P, rejected_P = dispatch.preference_loss(policy_N, *rest[:3], 0.1, token_weight_N=rest[3])
        return [losses_P, chosen_P, rejected_P, *torch.autograd.grad(losses_P.sum(), policy_N)]

    view = [tensor[1:] for tensor in (policy_N, reference_N, completion_N)] + [pairs_P2[1:], weight_N[1:]]
    apart = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in view]
    first = run(*[tensor.clone() for tensor in view])
    for other in (run(*view), run(*apart), run(*view)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_order_of_tokens_does_not_matter(device):
    policy_N, reference_N, completion_N, pairs_P2, _ = problem(900, device)
    order = torch.randperm(900, device=device)
    losses_P, _, _ = dispatch.preference_loss(policy_N, reference_N, completion_N, pairs_P2, 0.1)
    shuffled_P, _, _ = dispatch.preference_loss(policy_N[order], reference_N[order], completion_N[order], pairs_P2, 0.1)
    torch.testing.assert_close(losses_P, shuffled_P, atol=1e-6, rtol=1e-6)


def test_torch_compile_keeps_one_graph(device):
    policy_N, reference_N, completion_N, pairs_P2, _ = problem(50, device)

    factors = {"pair_beta_P": torch.rand(len(PAIRS), device=device), "pair_weight_P": torch.rand(5, device=device)}

    def loss(policy_N: Tensor) -> Tensor:
        arguments = (policy_N, reference_N, completion_N, pairs_P2, 0.1)
        own_P, _, _ = dispatch.preference_loss(*arguments, num_completions=6, **factors)
        return dispatch.preference_loss(*arguments, num_completions=6)[0].sum() + own_P.sum()

    policy_N.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(policy_N), policy_N)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(policy_N), policy_N))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type is 'dpo': use one of sigmoid, hinge, ipo, robust"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "loss_type 'ipo' has none"),
        ({"reference_logp_N": torch.zeros(3)}, "reference_logp_N has shape"),
        ({"completion_of_token_N": torch.zeros(2)}, "completion_of_token_N has dtype torch.float32"),
        ({"pairs_P2": torch.zeros(2, dtype=torch.int64)}, r"expected \[P, 2\]"),
        ({"policy_logp_N": torch.zeros(2, 1)}, r"expected \[N\]"),
        ({"pair_beta_P": torch.ones(2)}, r"pair_beta_P has shape \(2,\), pairs_P2 \(1, 2\): pass one per pair"),
        ({"pair_weight_P": torch.ones(1, 1)}, r"pair_weight_P has shape \(1, 1\)"),
        ({"pair_weight_P": torch.ones(1, dtype=torch.int64)}, "pair_weight_P has dtype torch.int64: use a float type"),
    ],
)
def test_bad_arguments_name_value_and_fix(device, change, message):
    arguments = {
        "policy_logp_N": torch.zeros(2),
        "reference_logp_N": torch.zeros(2),
        "completion_of_token_N": torch.tensor([0, 1]),
        "pairs_P2": torch.tensor([[0, 1]]),
        "beta": 0.1,
    } | change
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        dispatch.preference_loss(**moved)


def test_values_out_of_range(device):
    if device.type == "cuda":
        pytest.skip("values are not read on CUDA")
    policy_N, completion_N = torch.zeros(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="pairs_P2 holds 2, outside"):
        dispatch.preference_loss(policy_N, policy_N, completion_N, torch.tensor([[0, 2]]), 0.1, num_completions=2)
    with pytest.raises(ValueError, match=r"pairs_P2 holds -2, outside \[-1, 2\): .*; -1 is the constant 0"):
        dispatch.preference_loss(policy_N, policy_N, completion_N, torch.tensor([[0, -2]]), 0.1, num_completions=2)
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"pair_beta_P holds {beta:g}: use positive factors of beta"):
            dispatch.preference_loss(
                policy_N, policy_N, completion_N, torch.tensor([[0, 1]]), 0.1, pair_beta_P=torch.tensor([beta])
            )
    with pytest.raises(ValueError, match="completion_of_token_N holds -1"):
        dispatch.preference_loss(policy_N, policy_N, -completion_N, torch.tensor([[0, 1]]), 0.1, num_completions=2)
