"""Gradients in fp64 of the plain log-prob of a second target.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from bpo_kernels import plain


def fp64(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.7)])
def test_gradcheck_second_target_logprob(trained, softcap, scale):
    """With tokens that several rows share, a row whose targets are equal, and masked rows."""
    target_N, second_N = torch.tensor([3, 3, 5, -100, 0, 10]), torch.tensor([4, 3, 3, 2, -100, 0])
    assert torch.autograd.gradcheck(
        lambda logp, hidden, weight, bias: plain.second_target_logprob(
            logp, hidden, weight, target_N, second_N, bias, softcap, scale
        ),
        (fp64(6), fp64(6, 4), fp64(11, 4, grad=trained), fp64(11, grad=trained)),
    )


def test_result_and_gradients_are_those_of_the_head_in_fp64():
    hidden_NH, weight_VH, bias_V = fp64(9, 6), fp64(13, 6), fp64(13)
    target_N, second_N = torch.randint(13, (9,)), torch.randint(13, (9,))
    options, inputs = (bias_V, 3.0, 0.4), (hidden_NH, weight_VH, bias_V)
    logp_N = plain.linear_logprob(hidden_NH, weight_VH, target_N, *options)
    ours_N = plain.second_target_logprob(logp_N, hidden_NH, weight_VH, target_N, second_N, *options)
    theirs_N = plain.linear_logprob(hidden_NH, weight_VH, second_N, *options)
    assert ours_N.dtype is torch.float64
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-13, atol=1e-13)
    coefficient_N = torch.randn(9, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(value_N, inputs, coefficient_N) for value_N in (ours_N, theirs_N))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
