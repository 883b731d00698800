"""Splitting of completions and summation of pairs in the preference loss kernels; bytes moved.

    TRITON_INTERPRET=1 BPO_KERNELS=triton pytest tests/kernels/test_preference_sizes.py     (counts bytes, launches)

Legend: N tokens, K completions, P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bpo_kernels import dispatch, plain, preference_sizes
from bpo_kernels.bench.cases import Case, needed_work
from tests.pairwise import pairwise

# Lengths of consecutive completions, in pieces of 64 tokens: empty ones at both ends and within, whole
# pieces and one token more or less, one that begins with a block, and one that is far longer than the rest.
LENGTHS = (0, 1, 200, 119, 0, 0, 130, 64, 65, 63, 128, 1, 700, 5, 0)
# Every completion, in no order; number 2 in many pairs, a pair twice, one of a completion with itself, an empty one.
UNEVEN_PAIRS = [(k, 2) for k in range(14, 2, -1)] + [(2, 0), (1, 2), (12, 9), (12, 9), (6, 6), (4, 14), (7, 12)]


def contiguous(lengths: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Log-probs, weights and offsets of consecutive completions."""
    lengths_K, num_tokens = torch.tensor(lengths), sum(lengths)
    return {
        "policy": -torch.rand(num_tokens, device=device),
        "reference": -torch.rand(num_tokens, device=device),
        "completion": torch.repeat_interleave(torch.arange(len(lengths)), lengths_K).to(device),
        "weight": torch.rand(num_tokens, device=device),
        "starts": F.pad(lengths_K.cumsum(0), (1, 0)).to(device),
    }


def result(
    batch: dict[str, Tensor], pairs_P2: Tensor, coefficient_P: Tensor, with_starts: bool = True, **options: Any
) -> list[Tensor]:
    """Losses, both rewards and the gradient of `sum(coefficient * losses)`."""
    policy_N = batch["policy"].detach().requires_grad_()
    losses_P, chosen_P, rejected_P = dispatch.preference_loss(
        policy_N,
        batch["reference"],
        batch["completion"],
        pairs_P2,
        0.1,
        completion_starts_K1=batch["starts"] if with_starts else None,
        **options,
    )
    return [losses_P.detach(), chosen_P, rejected_P, *torch.autograd.grad(losses_P, policy_N, coefficient_P)]


@pytest.mark.parametrize(
    *pairwise(path=["few", "many"], with_starts=[True, False], weighted=[False, True]), indirect=["path"]
)
def test_completions_of_very_unequal_length(assert_as_exact_as_eager, device, path, with_starts, weighted):
    batch = contiguous(LENGTHS, device)
    pairs_P2 = torch.tensor(UNEVEN_PAIRS, device=device)
    weight_N = batch["weight"] if weighted else None
    starts_K1 = batch["starts"] if with_starts else None
    constants = (batch["reference"], batch["completion"], pairs_P2, 0.1)
    assert_as_exact_as_eager(
        lambda policy: dispatch.preference_loss(
            policy, *constants, token_weight_N=weight_N, completion_starts_K1=starts_K1
        )[0],
        lambda policy: plain.preference_loss(policy, *constants, token_weight_N=weight_N)[0],
        [batch["policy"].requires_grad_()],
        torch.randn(len(UNEVEN_PAIRS), device=device),
    )


@pytest.mark.parametrize("with_starts", [True, False], ids=["offsets", "no-offsets"])
def test_one_completion_in_every_pair_of_many(assert_as_exact_as_eager, device, monkeypatch, with_starts):
    """More pairs than a block holds: of the losses, of the search for the largest gradient, of the scatter."""
    monkeypatch.setattr(preference_sizes, "PEAK_BLOCK", 64)
    lengths = (200, *([1, 2, 0] * 90))
    batch = contiguous(lengths, device)
    pairs_P2 = torch.tensor([(0, k) if k % 3 else (k, 0) for k in range(1, len(lengths))], device=device)
    starts_K1 = batch["starts"] if with_starts else None
    constants = (batch["reference"], batch["completion"], pairs_P2, 0.1)
    assert_as_exact_as_eager(
        lambda policy: dispatch.preference_loss(policy, *constants, completion_starts_K1=starts_K1)[0],
        lambda policy: plain.preference_loss(policy, *constants)[0],
        [batch["policy"].requires_grad_()],
        torch.randn(len(pairs_P2), device=device),
    )


@pytest.mark.parametrize("with_starts", [True, False], ids=["offsets", "no-offsets"])
def test_order_of_the_pairs_changes_no_bit(device, path, on_triton, with_starts):
    batch = contiguous(LENGTHS, device)
    pairs_P2 = torch.tensor(UNEVEN_PAIRS, device=device)
    # Terms of very different size, whose fp32 sum depends on their order.
    coefficient_P = (torch.randn(len(pairs_P2)) * 10.0 ** torch.randint(-5, 1, (len(pairs_P2),))).to(device)
    order = torch.randperm(len(pairs_P2), device=device)
    first = result(batch, pairs_P2, coefficient_P, with_starts)
    again = result(batch, pairs_P2, coefficient_P, with_starts)
    other = result(batch, pairs_P2[order], coefficient_P[order], with_starts)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
    assert all(torch.equal(ours[order], theirs) for ours, theirs in zip(first[:3], other[:3], strict=True))
    if on_triton:
        assert torch.equal(first[3], other[3])
    else:
        torch.testing.assert_close(first[3], other[3])
    rewards = [
        (k, reward)
        for side in (0, 1)
        for k, reward in zip(pairs_P2[:, side].tolist(), first[1 + side].tolist(), strict=True)
    ]
    assert len(set(rewards)) == len({k for k, _ in rewards}), "a completion has the same reward in every pair"


@pytest.mark.parametrize("with_starts", [True, False], ids=["offsets", "no-offsets"])
def test_order_of_pairs_with_factors_and_anchors_changes_no_bit(device, path, on_triton, with_starts):
    batch = contiguous(LENGTHS, device)
    pairs = [*UNEVEN_PAIRS, (-1, 2), (2, -1), (-1, -1), (12, -1), (-1, 12)]
    pairs_P2, num_pairs = torch.tensor(pairs, device=device), len(pairs)
    size = 10.0 ** torch.randint(-4, 3, (num_pairs,))
    factors = {"pair_beta_P": 0.5 + torch.rand(num_pairs), "pair_weight_P": torch.rand(num_pairs) * size}
    factors = {name: factor.to(device) for name, factor in factors.items()}
    coefficient_P, order = torch.randn(num_pairs).to(device), torch.randperm(num_pairs, device=device)
    moved = {name: factor[order] for name, factor in factors.items()}
    first = result(batch, pairs_P2, coefficient_P, with_starts, **factors)
    other = result(batch, pairs_P2[order], coefficient_P[order], with_starts, **moved)
    assert all(torch.equal(ours[order], theirs) for ours, theirs in zip(first[:3], other[:3], strict=True))
    if on_triton:
        assert torch.equal(first[3], other[3])
    torch.testing.assert_close(first[3], other[3], rtol=1e-5, atol=1e-4)


def test_a_sum_does_not_depend_on_where_the_completion_lies(device, path, on_triton):
    alone = contiguous((300, 5), device)
    pairs_P2, coefficient_P = torch.tensor([[0, 1]], device=device), torch.ones(1, device=device)
    expected = result(alone, pairs_P2, coefficient_P)
    for before in (1, 63, 100):
        batch = contiguous((before, 300, 5), device)
        for name in ("policy", "reference"):
            batch[name][before:] = alone[name]
        moved = result(batch, pairs_P2 + 1, coefficient_P)
        if on_triton:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected[:3], moved[:3], strict=True))
        torch.testing.assert_close(moved[3][before:], expected[3])
        assert not moved[3][:before].any(), "a completion in no pair has no gradient"


def test_small_terms_keep_their_digits_beside_large_ones(device, path):
    batch = contiguous((3, 3, 3, 3), device)
    pairs_P2 = torch.tensor([[0, 1], [2, 3]], device=device)
    both = result(batch, pairs_P2, torch.tensor([1e6, 1e-2], device=device), loss_type="hinge")[3]
    torch.testing.assert_close(both[6:], torch.tensor([-1e-3] * 3 + [1e-3] * 3, device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_reaches_its_own_pairs_alone(device, path, bad):
    batch = contiguous((4, 70, 5, 6), device)
    batch["policy"][10] = bad  # of completion 1
    pairs_P2 = torch.tensor([[2, 1], [1, 3], [0, 3]], device=device)
    losses_P, _, _, grad_N = result(batch, pairs_P2, torch.ones(3, device=device), loss_type="ipo")
    assert losses_P.isfinite().tolist() == [False, False, True]
    assert not grad_N[4:].isfinite().any() and grad_N[:4].isfinite().all()


def test_offsets_and_pairs_of_32_bits(device, path):
    batch = contiguous(LENGTHS, device)
    pairs_P2, coefficient_P = torch.tensor(UNEVEN_PAIRS, device=device), torch.randn(len(UNEVEN_PAIRS), device=device)
    expected = result(batch, pairs_P2, coefficient_P)
    small = batch | {name: batch[name].int() for name in ("completion", "starts")}
    for ours, theirs in zip(result(small, pairs_P2.int(), coefficient_P), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_pair_outside_the_completions_writes_nowhere(device, path, on_triton):
    """On CUDA the indices are not checked: such a side counts as empty, and only the batch's memory is accessed."""
    if not on_triton:
        pytest.skip("plain PyTorch raises")
    from bpo_kernels import preference_loss

    batch = contiguous((40, 70), device)
    given = [batch[name] for name in ("policy", "reference", "completion")]
    pairs_P2 = torch.tensor([[0, 2], [-1, 1], [0, 1]], device=device)
    losses_P, chosen_P, rejected_P, derivative_P = preference_loss.forward(
        *given, pairs_P2, None, batch["starts"], None, None, 0.1, 0.0, "hinge"
    )
    assert rejected_P[0] == chosen_P[1] == 0.0 and losses_P.isfinite().all()
    coefficient_P = torch.tensor([1.0, 2.0, 4.0], device=device)
    grad_N = preference_loss.backward(
        coefficient_P, derivative_P, batch["policy"], batch["completion"], pairs_P2, None, batch["starts"]
    )
    torch.testing.assert_close(grad_N, torch.tensor([-0.5] * 40 + [0.6] * 70, device=device))


@pytest.fixture
def count_traffic(traffic) -> Callable[..., tuple[Counter, Counter]]:
    """Bytes moved by the forward and the backward of a call."""

    def measure(
        batch: dict[str, Tensor], pairs_P2: Tensor, weight_N: Tensor | None = None, **factors: Tensor
    ) -> tuple[Counter, Counter]:
        traffic.clear()
        policy_N = batch["policy"].detach().requires_grad_()
        losses_P, _, _ = dispatch.preference_loss(
            policy_N,
            batch["reference"],
            batch["completion"],
            pairs_P2,
            0.1,
            token_weight_N=weight_N,
            completion_starts_K1=batch["starts"],
            **factors,
        )
        forward = Counter(traffic)
        traffic.clear()
        losses_P.mean().backward()
        return forward, Counter(traffic)

    return measure


def expected_bytes(
    lengths: tuple[int, ...], pairs_P2: Tensor, has_weight: bool, **has_factors: bool
) -> tuple[int, int]:
    """`moved_bytes` of these completions."""
    later = [max(0, -(-length // preference_sizes.piece_tokens(sum(lengths))) - 1) for length in lengths]
    named, rows = [k for k in pairs_P2.flatten().tolist() if k >= 0], preference_sizes.GRAD_ROWS
    return preference_sizes.moved_bytes(
        sum(lengths),
        len(pairs_P2),
        len(lengths),
        has_weight,
        **has_factors,
        anchors=2 * len(pairs_P2) - len(named),
        tokens_of_pairs=sum(lengths[k] for k in named),
        later_pieces=sum(later),
        later_pieces_of_pairs=sum(later[k] for k in named),
        empty_tiles=sum(not any(lengths[i : i + rows]) for i in range(0, len(lengths), rows)),
    )


@pytest.mark.parametrize(
    *pairwise(
        path=["few", "many"],
        weighted=[False, True],
        lengths=[LENGTHS, (0,) * 9 + (129, 7), (1,) * 40, (2000, 1)],
    ),
    indirect=["path"],
    ids=str,
)
def test_the_kernels_move_the_bytes_of_the_formula(device, path, count_traffic, lengths, weighted):
    batch = contiguous(lengths, device)
    pairs_P2 = torch.randint(len(lengths), (19, 2))
    forward, backward = count_traffic(batch, pairs_P2, batch["weight"] if weighted else None)
    assert (forward["bytes"], backward["bytes"]) == expected_bytes(lengths, pairs_P2, weighted)
    assert (forward["launches"], backward["launches"]) == ((1, 1) if path == "few" else (2, 3))


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=["both", "beta", "weight"])
def test_factors_and_anchors_take_no_launch_and_the_bytes_of_the_formula(device, path, count_traffic, given):
    batch = contiguous(LENGTHS, device)
    pairs_P2 = torch.randint(-1, len(LENGTHS), (19, 2))
    pairs_P2[3] = -1
    names = [name for name, wanted in zip(("pair_beta", "pair_weight"), given, strict=True) if wanted]
    factors = {f"{name}_P": torch.rand(19, device=device) for name in names}
    forward, backward = count_traffic(batch, pairs_P2, **factors)
    expected = expected_bytes(LENGTHS, pairs_P2, False, **{f"has_{name}": True for name in names})
    assert (forward["bytes"], backward["bytes"]) == expected
    assert (forward["launches"], backward["launches"]) == ((1, 1) if path == "few" else (2, 3))


def test_few_pairs_of_many_tokens_take_two_launches_and_one(device, monkeypatch, count_traffic):
    monkeypatch.setattr(preference_sizes, "DIRECT_TOKENS", 100)
    lengths, pairs_P2 = (90, 1200, 30), torch.tensor([[0, 1], [2, 1]])
    forward, backward = count_traffic(contiguous(lengths, device), pairs_P2)
    assert (forward["launches"], backward["launches"]) == (2, 1)
    assert (forward["bytes"], backward["bytes"]) == expected_bytes(lengths, pairs_P2, False)


def test_counted_bytes_grow_linearly_and_stay_near_the_needed_ones(device, monkeypatch, count_traffic):
    """In the proportions of the benchmark: 128 tokens per completion, one pair per two completions, in any order."""
    monkeypatch.setattr(preference_sizes, "DIRECT_TOKENS", 0)
    monkeypatch.setattr(preference_sizes, "DIRECT_PAIRS", 0)

    def total(num_completions: int) -> int:
        pairs_P2 = torch.randperm(num_completions).view(-1, 2)
        counts = count_traffic(contiguous((128,) * num_completions, device), pairs_P2)
        return sum(count["bytes"] for count in counts)

    small, large = total(32), total(128)
    assert large == pytest.approx(4 * small, rel=0.01)
    assert (
        large
        <= 1.1
        * needed_work(Case("preference_loss", "gradient", "llava-1.5-7b", 128 * 128, "random", torch.float32, device))[
            1
        ]
    )


def test_formula_is_linear_and_within_its_bound_at_four_million_tokens():
    def total(num_tokens: int, tokens_per_completion: int = 128, pairs_per_completion: float = 0.5) -> int:
        num_completions = num_tokens // tokens_per_completion
        later = num_completions * (-(-tokens_per_completion // preference_sizes.piece_tokens(num_tokens)) - 1)
        num_pairs = int(num_completions * pairs_per_completion)
        return sum(preference_sizes.moved_bytes(num_tokens, num_pairs, num_completions, later_pieces=later))

    needed = needed_work(
        Case("preference_loss", "gradient", "llava-1.5-7b", 4 << 20, "random", torch.float32, torch.device("cpu"))
    )
    assert total(4 << 20) <= 1.1 * needed[1]
    for tokens_per_completion, pairs_per_completion in ((128, 0.5), (16, 8), (100_000, 4)):
        small, large = (
            total(num_tokens, tokens_per_completion, pairs_per_completion) for num_tokens in (1 << 24, 1 << 26)
        )
        assert large == pytest.approx(4 * small, rel=0.05)
