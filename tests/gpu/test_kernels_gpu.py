"""The Triton kernels on a real GPU: operation tests, real shapes, memory, addresses beyond 2^31.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bpo_kernels import dispatch
from bpo_kernels.bench.cases import TEST_FILES, Case, make_inputs, true_result
from bpo_kernels.bench.measure import TOLERANCES, disagreement, sample_ms, sleep_cycles
from bpo_kernels.bench.providers import OURS, PROVIDERS

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

KERNEL_TESTS = Path(__file__).parent.parent / "kernels"
# The files that kernels/bench.py runs before it times an operation.
FILES = tuple(name for names in TEST_FILES.values() for name in names)
# H, V of the LM heads that are benchmarked.
HEADS = {"llava-1.5-7b": (4096, 32064), "qwen2.5-vl-7b": (3584, 152064)}
OTHER_HEADS = {"llama-3-8b": (4096, 128256), "smollm": (576, 49152), "ragged": (1000, 31), "odd": (33, 4099)}


@pytest.mark.timeout(600)
def test_operation_tests_pass_on_the_gpu():
    """In parallel workers if available: nearly all of the time is compilation. `benchmarks/gpu.py` runs these tests as
    a separate part and skips this one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(KERNEL_TESTS / f) for f in FILES)]
    workers = min(12, len(os.sched_getaffinity(0)))
    if workers > 1 and importlib.util.find_spec("xdist") is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        command += ["-n", str(workers), "--dist", "worksteal"]
    environment = os.environ | {"BPO_KERNELS": "triton", "KERNEL_TEST_DEVICE": "cuda"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=KERNEL_TESTS.parent.parent)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
@pytest.mark.parametrize("head", HEADS | OTHER_HEADS)
def test_real_heads_are_as_exact_as_eager(head, mode, trained):
    hidden_size, vocab = (HEADS | OTHER_HEADS)[head]
    torch.manual_seed(0)
    hidden_NH = torch.randn(300, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(vocab, hidden_size, device="cuda").mul_(3 / hidden_size**0.5).bfloat16()
    weight_VH.requires_grad_(trained)
    target_N = torch.randint(vocab, (300,), device="cuda")
    inputs = [tensor for tensor in (hidden_NH, weight_VH) if tensor.requires_grad]

    def eager(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits_NV = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
        return torch.log_softmax(logits_NV, -1).gather(1, target_N[:, None])[:, 0]

    def run(operation, dtype) -> list[torch.Tensor]:
        cast = [tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in (hidden_NH, weight_VH)]
        logp_N = operation(*cast)
        return [logp_N, *torch.autograd.grad(logp_N.sum(), [tensor for tensor in cast if tensor.requires_grad])]

    truth = run(eager, torch.float64)
    naive = run(eager, torch.bfloat16)
    ours = run(lambda hidden, weight: dispatch.linear_logprob(hidden, weight, target_N, mode=mode), torch.bfloat16)
    assert len(ours) == 1 + len(inputs)
    for position, (true, rough, value) in enumerate(zip(truth, naive, ours, strict=True)):
        allowed = (rough - true).abs().max() + (6e-3 if position else 1e-5) * true.abs().max()
        assert (value - true).abs().max() <= allowed, f"output {position}"


@pytest.mark.parametrize("logits", ["random", "peaked"])
@pytest.mark.parametrize("provider", OURS)
@pytest.mark.parametrize("variant", ["live-frozen", "live-trained", "stored-frozen"])
@pytest.mark.parametrize("shape", HEADS)
def test_pairs_agree_with_fp32_in_every_mode(shape, variant, provider, logits):
    case = Case("linear_preference_loss", variant, shape, 512, logits, torch.bfloat16, torch.device("cuda"))
    inputs = make_inputs(case)
    step = PROVIDERS[case.operation][provider](case, inputs)
    value_error, gradient_error = disagreement(case, step(), true_result(case, inputs))
    value_limit, gradient_limit = TOLERANCES[case.dtype]
    assert value_error <= value_limit and gradient_error <= gradient_limit


@pytest.mark.parametrize("variant", ["forward", "frozen", "trained"])
@pytest.mark.parametrize("provider", OURS)
def test_the_same_bits_twice(provider, variant):
    case = Case("linear_logprob", variant, "llava-1.5-7b", 300, "peaked", torch.bfloat16, torch.device("cuda"))
    step = PROVIDERS[case.operation][provider](case, make_inputs(case))
    first = [tensor.clone() for tensor in step()]
    assert all(torch.equal(once, again) for once, again in zip(first, step(), strict=True))


def test_times_are_the_devices_and_not_the_hosts():
    """A step whose host waits 3 ms between its two kernels."""
    device = torch.device("cuda", torch.cuda.current_device())
    small = torch.zeros(16, device=device)

    def step() -> None:
        small.add_(1.0)
        time.sleep(0.003)
        small.add_(1.0)

    step()
    cycles = sleep_cycles(step, device)
    assert sample_ms(step, device, 1) > 1.5  # the first kernel begins some tenths of a ms after its event
    assert min(sample_ms(step, device, cycles) for _ in range(5)) < 0.5


def test_frozen_head_over_chunks_stays_within_the_budget():
    hidden_NH = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(152064, 1024, device="cuda", dtype=torch.bfloat16)
    target_N = torch.randint(152064, (4096,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dispatch.linear_logprob(hidden_NH, weight_VH, target_N, budget_bytes=256 << 20).sum().backward()
    # fp32 logits of a chunk, D in bf16, the gradient twice.
    allowed_bytes = (256 << 20) * 3 // 2 + 4 * hidden_NH.numel() * 2
    assert torch.cuda.max_memory_allocated() - before < allowed_bytes + (16 << 20)


def test_addresses_beyond_two_to_the_31st():
    vocab, num_rows = 152064, 15000
    logits_NV = torch.zeros(num_rows, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert logits_NV.numel() > 2**31
    target_N = torch.full((num_rows,), vocab - 1, device="cuda")
    with torch.no_grad():
        logits_NV[-1, -1] = 8.0
    logp_N = dispatch.logprob_gather(logits_NV, target_N)
    expected = torch.log_softmax(logits_NV[-1].detach().double(), -1)[-1]
    assert logp_N[-1].item() == pytest.approx(expected.item(), rel=1e-5)
    logp_N[-1].backward()
    assert logits_NV.grad[-1, -1].item() == pytest.approx(1 - expected.exp().item(), rel=1e-2)
    assert not logits_NV.grad[:-1].any()


def test_kept_derivatives_beyond_two_to_the_31st():
    num_rows, vocab, hidden_size = 15000, 152064, 64
    assert num_rows * vocab > 2**31
    hidden_NH = torch.randn(num_rows, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(vocab, hidden_size, device="cuda").mul_(0.2).bfloat16().requires_grad_()
    target_N = torch.randint(vocab, (num_rows,), device="cuda")

    def last_rows(rows: slice, mode: str) -> list[torch.Tensor]:
        logp_n = dispatch.linear_logprob(hidden_NH[rows], weight_VH, target_N[rows], mode=mode, budget_bytes=8 << 30)
        return [logp_n[-4:], torch.autograd.grad(logp_n[-4:].sum(), hidden_NH)[0][-4:]]

    torch.testing.assert_close(last_rows(slice(None), "store"), last_rows(slice(-8, None), "recompute"))
