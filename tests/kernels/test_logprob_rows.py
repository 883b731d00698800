"""Both kernels over given logits: rows in registers, and rows that are streamed.

    TRITON_INTERPRET=1 BPO_KERNELS=triton pytest tests/kernels/test_logprob_rows.py

tests/kernels/test_triton_interpreter.py runs them so. Through the public operations, test_linear_logprob.py does.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bpo_kernels.head import Head
from tests.pairwise import pairwise

IN_REGISTERS = [1, 31, 128, 1031, 32064]
STREAMED = 50_001
OUT_OF_RANGE = 1 << 40
# The interpreter rounds to bf16 by truncation.
BF16_STEP = 2**-7


@pytest.fixture(autouse=True)
def _on_triton(on_triton):
    if not on_triton:
        pytest.skip("the plain path has no such kernels: BPO_KERNELS=triton")


@pytest.fixture
def rows():
    from bpo_kernels import logprob_rows

    return logprob_rows


def true_result(logits_NV, target_N, scale=1.0):
    """Log-probs and D in fp64; 0 for masked rows."""
    z_NV = logits_NV.double() * scale
    counted_N = target_N != -100
    index_N1 = target_N.clamp(min=0, max=logits_NV.shape[1] - 1)[:, None]
    logp_N = z_NV.log_softmax(1).gather(1, index_N1)[:, 0].where(counted_N, 0.0)
    onehot_NV = torch.zeros_like(z_NV).scatter_(1, index_N1, 1.0)
    dlogits_NV = (onehot_NV - z_NV.softmax(1)) * scale
    return logp_N, dlogits_NV.where(counted_N[:, None], 0.0)


@pytest.mark.parametrize(
    *pairwise(vocab=[*IN_REGISTERS, STREAMED], dtype=[torch.bfloat16, torch.float32], scale=[1.0, -0.25]), ids=str
)
def test_log_probs_and_their_derivative(rows, device, vocab, scale, dtype):
    """More rows than are in flight; a masked row, whose NaN must not propagate."""
    num_rows = 5
    logits_NV = 8 * torch.randn(num_rows, vocab, device=device)
    target_N = torch.randint(vocab, (num_rows,), device=device)
    target_N[1] = -100
    true_logp_N, true_NV = true_result(logits_NV, target_N, scale)
    logits_NV[1] = torch.nan
    # As head.py calls it: D of full precision takes the logits' own memory.
    given_NV = logits_NV.clone()
    place_NV = given_NV if dtype is torch.float32 else torch.full_like(logits_NV, torch.nan, dtype=dtype)
    outputs = rows.rows_from_logits(given_NV, target_N, Head(scale=scale), place_NV, dtype, False)
    torch.testing.assert_close(outputs.logp_n.double(), true_logp_N, atol=2e-6, rtol=2e-6)
    tolerance = 1e-6 if dtype is torch.float32 else BF16_STEP
    torch.testing.assert_close(place_NV.double(), true_NV, atol=1e-7, rtol=tolerance)
    without = rows.rows_from_logits(logits_NV, target_N, Head(scale=scale), None, dtype, False)
    assert torch.equal(without.logp_n, outputs.logp_n)


@pytest.mark.parametrize("vocab", [1031, STREAMED])
def test_a_target_outside_the_vocabulary_is_nan_and_its_derivative_that_of_no_target(rows, device, vocab):
    """Even if its low 32 bits look like a token."""
    logits_NV = torch.randn(2, vocab, device=device)
    target_N = torch.tensor([vocab, OUT_OF_RANGE + 3], device=device)
    place_NV = torch.empty_like(logits_NV, dtype=torch.bfloat16)
    outputs = rows.rows_from_logits(logits_NV, target_N, Head(), place_NV, torch.bfloat16, False)
    assert outputs.logp_n.isnan().all()
    expected_NV = -logits_NV.double().softmax(1)
    torch.testing.assert_close(place_NV.double(), expected_NV, atol=1e-7, rtol=BF16_STEP)


@pytest.mark.parametrize("options", ["bias and cap", "statistics"])
def test_streamed_rows_with_options(rows, device, options):
    """The vocabulary ends inside a tile; the row's maximum, or a whole tile of -inf, may be in any tile."""
    vocab = 10_007
    logits_NV = 3 * torch.randn(4, vocab, device=device)
    logits_NV[0, 4096:8192] = -torch.inf
    logits_NV[1, :4096] = -torch.inf
    logits_NV[2, vocab - 1] = 4000.0
    logits_NV[3, 5:9] = 100.0  # the first of equal ones is the argmax
    target_N = torch.tensor([3, 9000, 0, 7], device=device)
    bias_V, softcap = (torch.randn(vocab, device=device), 30.0) if options == "bias and cap" else (None, None)
    z_NV = logits_NV.double() if bias_V is None else softcap * torch.tanh((logits_NV + bias_V).double() / softcap)
    place_NV = torch.empty_like(logits_NV)
    statistics = options == "statistics"
    outputs = rows.rows_from_logits(logits_NV, target_N, Head(bias_V, softcap), place_NV, torch.float32, statistics)
    expected_NV = z_NV.log_softmax(1)
    torch.testing.assert_close(outputs.logp_n.double(), expected_NV[range(4), target_N], atol=3e-6, rtol=3e-6)
    onehot_NV = torch.zeros_like(z_NV).scatter_(1, target_N[:, None], 1.0)
    slope_NV = 1.0 if softcap is None else 1 - (z_NV / softcap) ** 2
    torch.testing.assert_close(place_NV.double(), (onehot_NV - expected_NV.exp()) * slope_NV, atol=1e-6, rtol=1e-5)
    if statistics:
        entropy_N = -(expected_NV.exp() * expected_NV).nan_to_num().sum(1)
        torch.testing.assert_close(outputs.entropy_n.double(), entropy_N, atol=3e-6, rtol=3e-6)
        assert torch.equal(outputs.argmax_n, logits_NV.argmax(1))
        assert outputs.argmax_n[3] == 5
        collision_N = (2 * expected_NV).logsumexp(1)
        torch.testing.assert_close(outputs.collision_n.double(), collision_N, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    ("vocab", "dtype", "plain", "expected"),
    [
        (32064, torch.bfloat16, True, (16384, 16384, 16)),
        (49152, torch.bfloat16, True, (32768, 16384, 16)),
        (32768, torch.float32, True, (32768, 0, 16)),
        (49152, torch.float32, True, (8192, None, 32)),
        (49153, torch.bfloat16, True, (8192, None, 32)),
        (152064, torch.bfloat16, True, (8192, None, 32)),
        (32064, torch.bfloat16, False, (4096, None, 16)),
        (1, torch.bfloat16, True, (1, 0, 4)),
    ],
)
def test_a_row_stays_in_registers_where_it_fits(rows, vocab, dtype, plain, expected):
    config = rows.row_config(vocab, dtype, plain=plain)
    assert (config.BLOCK_V, config.REST_V, config.num_warps) == expected
    # Blocks of AMD have at most 16 warps, whose barriers do not order stores to memory.
    amd = rows.row_config(vocab, dtype, plain=plain, amd=True)
    assert amd.REST_V is None and amd.num_warps <= 16


@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "one left out"])
@pytest.mark.parametrize(("vocab", "reads"), [(1031, 1), (32064, 1), (STREAMED, 2)])
def test_a_row_in_registers_is_read_once(rows, traffic, device, vocab, reads, ignored):
    """6 bytes per logit with half-precision D, 4 without; a streamed row is read again from the L2 to write D."""
    logits_NV = torch.randn(5, vocab, device=device)
    target_N = torch.randint(vocab, (5,), device=device)
    counted_N = torch.ones(5, dtype=torch.bool)
    if ignored:
        target_N[2] = -100
        counted_N[2] = reads == 1  # a masked streamed row is not read at all
    place_NV = torch.empty_like(logits_NV, dtype=torch.bfloat16)
    own_bytes = 4 * int((target_N != -100).sum())
    traffic.clear()
    rows.rows_from_logits(logits_NV, target_N, Head(), None, torch.bfloat16, False)
    num_read = int(counted_N.sum())
    assert traffic["bytes"] == rows.moved_bytes(5, vocab, None) - (5 - num_read) * 4 * vocab + own_bytes
    traffic.clear()
    rows.rows_from_logits(logits_NV, target_N, Head(), place_NV, torch.bfloat16, False)
    own_stores = own_bytes // 2 if reads == 1 else 0
    again = (reads - 1) * num_read * 4 * vocab
    expected = rows.moved_bytes(5, vocab, 2) - (5 - num_read) * 4 * vocab + own_bytes + own_stores + again
    assert traffic["bytes"] == expected and traffic["launches"] == 1


def test_no_more_rows_are_in_flight_than_the_l2_holds(rows, monkeypatch):
    """50 MiB of an H100: 86 rows of Qwen's vocabulary in fp32; a row as large as the cache still runs."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))
    in_flight = rows._rows_in_flight.__wrapped__  # results per device are cached
    assert in_flight(torch.device("cuda"), 4 * 152064) == 86
    assert in_flight(torch.device("cuda"), 100 << 20) == 1
