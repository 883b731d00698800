"""Log-probs from logits.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bpo_kernels import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """In the dtype of the logits, as a model's own loss would compute it."""
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    return logp_NV.gather(1, target_N[:, None])[:, 0].to(torch.promote_types(logits_NV.dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "vocab"), [(0, 31), (1, 31), (7, 1), (3, 4099), (2, 8192)])
def test_forward_and_gradient_are_as_exact_as_eager(assert_as_exact_as_eager, device, dtype, num_rows, vocab):
    logits_NV = (4 * torch.randn(num_rows, vocab, device=device)).to(dtype).requires_grad_()
    target_N = torch.randint(vocab, (num_rows,), device=device)
    assert_as_exact_as_eager(
        lambda logits: dispatch.logprob_gather(logits, target_N),
        lambda logits: eager(logits, target_N),
        [logits_NV],
        torch.randn(num_rows, device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(assert_as_exact_as_eager, device, dtype):
    logits_NV = torch.randn(6, 300, device=device)
    logits_NV = (logits_NV * 1e4 / logits_NV.abs().max()).to(dtype)
    logits_NV[0] = 1e4
    logits_NV[1] = -1e4
    logits_NV[2, 5] = 1e4
    target_N = torch.tensor([0, 299, 5, 6, 7, 8], device=device)
    assert_as_exact_as_eager(
        lambda logits: dispatch.logprob_gather(logits, target_N),
        lambda logits: eager(logits, target_N),
        [logits_NV.requires_grad_()],
        torch.ones(6, device=device),
    )


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_large_logits_keep_the_digits_of_the_probabilities(device, level):
    """fp32 numbers near 10,000 are 0.001 apart: maximum and log-sum must not be added up."""
    logits_NV = torch.full((1, 300), level, device=device, requires_grad=True)
    logp_N = dispatch.logprob_gather(logits_NV, torch.zeros(1, dtype=torch.int64, device=device))
    assert logp_N.item() == pytest.approx(-math.log(300), rel=1e-6)
    (grad_NV,) = torch.autograd.grad(logp_N.sum(), logits_NV)
    assert grad_NV[0, 1:].tolist() == pytest.approx([-1 / 300] * 299, rel=3e-6)


def test_masked_vocabulary_entries_have_no_probability(device):
    """Whole tiles of -inf, first and last, as with a padded vocabulary or tokens forbidden by a decoder."""
    logits_NV = torch.full((2, 9000), -float("inf"), device=device)
    logits_NV[:, 4500:4510] = torch.randn(2, 10, device=device)
    logits_NV.requires_grad_()
    target_N = torch.tensor([4500, 4509], device=device)
    logp_N = dispatch.logprob_gather(logits_NV, target_N)
    torch.testing.assert_close(logp_N, eager(logits_NV, target_N))
    (grad_NV,) = torch.autograd.grad(logp_N.sum(), logits_NV)
    assert grad_NV.isfinite().all()
    assert (grad_NV[:, :4500] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_whose_maximum_moves_with_every_tile(assert_as_exact_as_eager, device, dtype):
    """Rising, falling and alternating over three tiles, around 5,000: each lane rescales its sum, or never does."""
    rising_V = torch.linspace(-20, 20, 9001, device=device)
    logits_NV = torch.stack([rising_V, rising_V.flip(0), rising_V.where(rising_V > 0, rising_V.flip(0)), 0 * rising_V])
    logits_NV = torch.cat([logits_NV, logits_NV + 5000]).to(dtype)
    target_N = torch.tensor([9000, 0, 4500, 17] * 2, device=device)
    assert_as_exact_as_eager(
        lambda logits: dispatch.logprob_gather(logits, target_N),
        lambda logits: eager(logits, target_N),
        [logits_NV.requires_grad_()],
        torch.ones(8, device=device),
    )


@pytest.mark.parametrize("vocab", [5, 300, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowest_numbers_and_infinities_as_masks(device, dtype, vocab):
    """The dtype's lowest number is an ordinary logit; only rows without a finite maximum are NaN."""
    logits_NV = torch.randn(6, vocab, device=device).to(dtype)
    lowest = torch.finfo(dtype).min
    logits_NV[0, 1:] = lowest
    logits_NV[1] = lowest
    logits_NV[2, :-1] = -float("inf")
    logits_NV[3] = -float("inf")
    logits_NV[4, 2] = float("inf")
    logits_NV[5, 3] = float("nan")
    target_N = torch.tensor([0, 1, vocab - 1, 0, 2, 0], device=device)
    leaf_NV = logits_NV.requires_grad_()
    logp_N = dispatch.logprob_gather(leaf_NV, target_N)
    assert logp_N.tolist()[:3] == pytest.approx([0.0, -math.log(vocab), 0.0], rel=1e-6)
    assert logp_N[3:].isnan().all()
    (grad_NV,) = torch.autograd.grad(logp_N[:3].sum(), leaf_NV)
    assert grad_NV[:3].isfinite().all()


def test_strided_logits_unaligned_targets_and_expanded_gradient(device):
    storage = torch.randn(400, 9, device=device)
    logits_NV = storage.t()[1:, 3:303].requires_grad_()
    target_N = torch.randint(300, (9,), device=device)[1:]
    logp_N = dispatch.logprob_gather(logits_NV, target_N)
    expected_N = eager(logits_NV, target_N)
    torch.testing.assert_close(logp_N, expected_N)
    one = torch.ones((), device=device).expand(8)
    torch.testing.assert_close(
        torch.autograd.grad(logp_N, logits_NV, one), torch.autograd.grad(expected_N, logits_NV, one)
    )


def test_same_bits_twice_and_in_any_row_order(device):
    logits_NV = torch.randn(9, 5000, device=device)
    target_N = torch.randint(5000, (9,), device=device)
    order = torch.randperm(9, device=device)
    logp_N = dispatch.logprob_gather(logits_NV, target_N)
    assert torch.equal(logp_N, dispatch.logprob_gather(logits_NV, target_N))
    assert torch.equal(logp_N[order], dispatch.logprob_gather(logits_NV[order], target_N[order]))


@pytest.mark.parametrize(
    ("logits_shape", "target", "message"),
    [
        ((2, 3, 4), [0, 1], r"\(2, 3, 4\), expected \[N, V\]"),
        ((2, 4), [0], "target_N has shape"),
        ((2, 4), [0.0, 1.0], "pass token ids as torch.int64"),
        ((2, 0), [0, 0], "the vocabulary is empty"),
    ],
)
def test_bad_arguments_name_value_and_fix(device, logits_shape, target, message):
    with pytest.raises(ValueError, match=message):
        dispatch.logprob_gather(torch.zeros(logits_shape, device=device), torch.tensor(target, device=device))


def test_target_outside_the_vocabulary(device):
    logits_NV, target_N = torch.zeros(2, 4, device=device), torch.tensor([0, 4], device=device)
    if device.type == "cuda":
        assert dispatch.logprob_gather(logits_NV, target_N).isnan().tolist() == [False, True]
    else:
        with pytest.raises(ValueError, match="target_N holds 4, outside"):
            dispatch.logprob_gather(logits_NV, target_N)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_with_target_minus_100_counts_for_nothing(device, inplace):
    leaf_NV = torch.randn(4, 300, device=device, requires_grad=True)
    target_N = torch.tensor([5, -100, 7, -100], device=device)
    logp_N = dispatch.logprob_gather(leaf_NV * 1, target_N, inplace_backward=inplace)
    torch.testing.assert_close(logp_N[::2], eager(leaf_NV[::2], target_N[::2]))
    assert logp_N[1::2].tolist() == [0.0, 0.0]
    (grad_NV,) = torch.autograd.grad(logp_N.sum(), leaf_NV)
    assert not grad_NV[1::2].any() and grad_NV[::2].any(1).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_backward_gives_the_same_gradient_in_the_memory_of_the_logits(device, dtype, transposed):
    hidden_NH = torch.randn(6, 16, device=device).to(dtype).requires_grad_()
    weight_HV = torch.randn(16, 4100, device=device).to(dtype)
    target_N = torch.randint(4100, (6,), device=device)

    def gradient(inplace: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        logits_NV = (weight_HV.t() @ hidden_NH.t()).t() if transposed else hidden_NH @ weight_HV
        before_NV, grads_NV = logits_NV.detach().clone(), []
        logits_NV.register_hook(lambda grad_NV: grads_NV.append(grad_NV.clone()))
        logp_N = dispatch.logprob_gather(logits_NV, target_N, inplace_backward=inplace)
        (grad_NH,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
        return grads_NV, grad_NH, logits_NV.detach(), before_NV

    (ours_NV,), ours_NH, overwritten_NV, before_NV = gradient(True)
    (theirs_NV,), theirs_NH, untouched_NV, _ = gradient(False)
    assert torch.equal(ours_NV, theirs_NV)
    # Their strides differ, and with them the summation order of a BLAS.
    torch.testing.assert_close(ours_NH, theirs_NH, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else 2e-2)
    assert torch.equal(overwritten_NV, ours_NV)
    assert torch.equal(untouched_NV, before_NV) and not torch.equal(overwritten_NV, before_NV)


def test_in_place_backward_never_corrupts_in_silence(device):
    target_N = torch.tensor([1, 2], device=device)
    leaf_NV = torch.randn(2, 40, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="a leaf whose values belong to the caller"):
        dispatch.logprob_gather(leaf_NV, target_N, inplace_backward=True)
    with pytest.raises(ValueError, match="call .contiguous"):
        dispatch.logprob_gather((leaf_NV[:1] * 1).expand(2, 40), target_N, inplace_backward=True)
    capped_NV = leaf_NV.tanh()  # its backward needs its output
    logp_N = dispatch.logprob_gather(capped_NV, target_N, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp_N.sum().backward()
