"""The formulas of FLOPs and memory against a profiler's counts.

Memory is that of the plain PyTorch path on a CPU: chunked, never [N, V] for all N where a mode does not say so.
Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bpo_kernels import dispatch, plain
from bpo_kernels.bench import cases as bench_cases
from bpo_kernels.bench.cases import Case, Shape, formula_peak_bytes, gemm_flops, needed_work, performed_gemms
from bpo_kernels.bench.measure import counted_flops, peak_extra_bytes
from bpo_kernels.bench.providers import PROVIDERS

CPU = torch.device("cpu")
NUM_ROWS, CHUNK_ROWS = 64, 16
PROVIDER = {"eager": "eager", "store": "bpo-store", "recompute": "bpo-recompute", "fused": "bpo-fused"}


@pytest.fixture
def wide(monkeypatch):
    """A head dominated by its logits, V >> H; and the plain path, regardless of BPO_KERNELS."""
    monkeypatch.setitem(bench_cases.SHAPES, "wide", Shape(32, 8192, 8))
    for operation in ("linear_logprob", "linear_preference_loss"):
        monkeypatch.setattr(dispatch, operation, getattr(plain, operation))


def head_case(operation: str, variant: str, chunk_rows: int | None = None) -> Case:
    budget_bytes = None if chunk_rows is None else chunk_rows * 8192 * 4
    return Case(operation, variant, "wide", NUM_ROWS, "peaked", torch.float32, CPU, budget_bytes)


def step_of(case: Case, mode: str):
    return PROVIDERS[case.operation][PROVIDER[mode]](case, bench_cases.make_inputs(case))


@pytest.mark.parametrize("mode", ["eager", "store", "recompute", "fused"])
@pytest.mark.parametrize(
    ("operation", "variant", "needed"),
    [
        ("linear_logprob", "forward", 1),
        ("linear_logprob", "frozen", 2),
        ("linear_logprob", "trained", 3),
        ("linear_preference_loss", "live-frozen", 3),
        ("linear_preference_loss", "live-trained", 4),
        ("linear_preference_loss", "stored-frozen", 2),
    ],
)
def test_gemms_are_those_of_the_formula(wide, mode, operation, variant, needed):
    case = head_case(operation, variant)
    assert needed_work(case)[0] == needed * gemm_flops(case)
    counted = counted_flops(step_of(case, mode))
    assert counted == performed_gemms(case, mode) * gemm_flops(case)


@pytest.mark.parametrize("variant", ["forward", "frozen", "trained"])
@pytest.mark.parametrize("mode", ["eager", "store", "recompute"])
def test_peak_memory_follows_the_formula(wide, mode, variant):
    # `store` saves D of all rows of a trained head, so it must fit the budget.
    whole = mode == "eager" or (mode == "store" and variant == "trained")
    chunk_rows = NUM_ROWS if whole else CHUNK_ROWS
    case = head_case("linear_logprob", variant, chunk_rows)
    expected = formula_peak_bytes(case, mode, chunk_rows)
    assert expected <= 1.02 * peak_extra_bytes(step_of(case, mode), CPU)
    assert peak_extra_bytes(step_of(case, mode), CPU) <= 1.08 * expected


@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
def test_chunks_keep_the_logits_of_all_rows_out_of_memory(wide, mode):
    all_logits = NUM_ROWS * 8192 * 4
    case = head_case("linear_logprob", "frozen", CHUNK_ROWS)
    assert peak_extra_bytes(step_of(case, mode), CPU) < all_logits / 2
    whole = dataclasses.replace(case, budget_bytes=None)
    if mode != "fused":
        assert peak_extra_bytes(step_of(whole, mode), CPU) >= all_logits


def test_bytes_of_the_operations_without_a_gemm():
    gather = Case("logprob_gather", "gradient", "tiny", 64, "random", torch.bfloat16, CPU)
    assert needed_work(gather) == (0, 3 * 64 * 1031 * 2)
    pairs = Case("preference_loss", "gradient", "tiny", 512, "random", torch.float32, CPU)
    assert pairs.num_pairs == 2 and needed_work(pairs) == (0, 512 * 12 + 2 * 5 * 8 + 2 * 48)
    terms = dataclasses.replace(pairs, variant="terms")
    assert terms.num_losses == 4 and needed_work(terms) == (0, 512 * 12 + 2 * 5 * 8 + 4 * 56)
    second = Case("second_target_logprob", "frozen", "tiny", 64, "random", torch.bfloat16, CPU)
    assert needed_work(second) == (0, 64 * (6 * 64 * 2 + 64))
    trained = dataclasses.replace(second, variant="trained")
    assert needed_work(trained) == (0, 64 * (7 * 64 * 2 + 64) + 1031 * 64 * 2)
