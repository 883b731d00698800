"""Guarantees of the plain PyTorch path only: fp64 gradients and memory.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bpo_kernels import plain


def fp64(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("chunk_rows", [5, 2])
@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.7)])
def test_gradcheck_linear_logprob(trained, chunk_rows, mode, softcap, scale):
    target_N = torch.randint(11, (5,))
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: plain.linear_logprob(
            hidden, weight, target_N, bias, softcap, scale, mode=mode, budget_bytes=chunk_rows * 11 * 8
        ),
        (fp64(5, 4), fp64(11, 4, grad=trained), fp64(11, grad=trained)),
    )


def test_gradcheck_logprob_gather():
    target_N = torch.randint(11, (5,))
    assert torch.autograd.gradcheck(lambda logits: plain.logprob_gather(logits, target_N), (fp64(5, 11),))


@pytest.mark.parametrize(
    ("loss_type", "eps"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_gradcheck_preference_loss(loss_type, eps):
    completion_N, pairs_P2 = torch.arange(12) % 4, torch.tensor([[0, 1], [0, -1], [-1, 2], [3, 1]])
    factors = {"pair_beta_P": 0.5 + torch.rand(4), "pair_weight_P": torch.rand(4)}
    reference_N, weight_N = fp64(12, grad=False), torch.rand(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda policy_N: plain.preference_loss(
            policy_N, reference_N, completion_N, pairs_P2, 0.3, eps, loss_type, weight_N, **factors
        )[0],
        (fp64(12),),
    )


@pytest.mark.parametrize("live", [True, False], ids=["live", "stored"])
def test_gradcheck_linear_preference_loss(live):
    completion_N, pairs_P2 = torch.arange(6) // 2, torch.tensor([[0, 1], [0, 2]])
    target_N = torch.randint(11, (6,))
    reference_is = fp64(6, 4, grad=False) if live else fp64(6, grad=False)

    def outputs(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A live reference shares the head but is a constant: a copy excludes it from the finite differences.
        own_head = {"reference_weight_VH": WEIGHT} if live else {}
        losses_P, _, _, logp_N = plain.linear_preference_loss(
            hidden, weight, target_N, reference_is, completion_N, pairs_P2, 0.3, **own_head
        )
        return losses_P, logp_N

    assert torch.autograd.gradcheck(outputs, (fp64(6, 4), fp64(11, 4)))


WEIGHT = torch.randn(11, 4, dtype=torch.float64)
_MEMORY_PROGRAM = """
import resource, torch
from bpo_kernels import plain
num_rows, vocab, hidden_size = 2048, 16384, 16
hidden, weight = torch.randn(num_rows, hidden_size, requires_grad=True), torch.randn(vocab, hidden_size)
weight.requires_grad_({trained})
target = torch.randint(vocab, (num_rows,))
plain.linear_logprob(hidden[:2], weight, target[:2]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plain.linear_logprob(hidden, weight, target, budget_bytes=8 << 20).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_all_logits_are_never_alive(trained):
    """2,048 x 16,384 fp32 logits are 128 MiB; with a budget of 8 MiB the process must not grow by half of that."""
    program = _MEMORY_PROGRAM.format(trained=trained)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 48, f"peak memory grew by {result.stdout.strip()} MiB"
