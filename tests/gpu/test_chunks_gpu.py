"""Row kernels on a second stream of a real GPU."""

from __future__ import annotations

import pytest
import torch

from bpo_kernels import head

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("vocab", [32064, 152064])
def test_two_streams_give_the_bits_of_one(monkeypatch, vocab, mode, trained):
    from bpo_kernels.linear_logprob import ROWS

    torch.manual_seed(0)
    hidden_NH = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    weight_VH = torch.randn(vocab, 1024, device="cuda").mul_(0.1).bfloat16()
    target_N, coefficient_N = torch.randint(vocab, (2048,), device="cuda"), torch.randn(2048, device="cuda")
    plan = head.HeadPlan(mode, 512, mode == "store" and not trained, mode == "store" and trained)
    results = []
    for switch in ("0", "1", "1"):
        monkeypatch.setenv("BPO_KERNELS_OVERLAP", switch)
        arguments = (hidden_NH, weight_VH, target_N, head.Head())
        outputs, *kept = head.head_forward(ROWS, *arguments, plan)
        grads = head.head_backward(ROWS, coefficient_N, *arguments, plan.step, *kept, (True, trained, False))
        results.append([outputs.logp_n, *(grad for grad in grads if grad is not None)])
        # Memory freed while a stream still uses it would be reused here and overwritten.
        torch.full((2 * 512 * vocab,), torch.nan, device="cuda")
    for once, *others in zip(*results, strict=True):
        assert not once.isnan().any()
        assert all(torch.equal(once, other) for other in others)
