"""Log-probs from hidden states.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bpo_kernels import checks, dispatch, head
from tests.pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The computation of a model and its loss: logits in the model's dtype, log-softmax in fp32."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return torch.log_softmax(logits_NV, dim=-1).gather(1, target_N[:, None])[:, 0]


def problem(num_rows, vocab, hidden_size, dtype, device, trained=True, with_bias=False):
    """Hidden states, weight, bias, targets; logits of some units, as in a trained model."""
    hidden_NH = torch.randn(num_rows, hidden_size, device=device).to(dtype).requires_grad_()
    weight_VH = (
        (3 * torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype).requires_grad_(trained)
    )
    bias_V = torch.randn(vocab, device=device).to(dtype).requires_grad_(trained) if with_bias else None
    return hidden_NH, weight_VH, bias_V, torch.randint(vocab, (num_rows,), device=device)


@pytest.mark.parametrize(
    *pairwise(
        dtype=DTYPES,
        trained=[True, False],
        capped=[False, True],
        chunk_rows=[None, 2],
        mode=["store", "recompute", "fused"],
        shape=[(0, 31, 7), (1, 31, 7), (5, 4099, 33)],
    ),
    ids=str,
)
def test_forward_and_gradients_are_as_exact_as_eager(
    assert_as_exact_as_eager, device, dtype, trained, capped, chunk_rows, mode, shape
):
    num_rows, vocab, hidden_size = shape
    *tensors, target_N = problem(num_rows, vocab, hidden_size, dtype, device, trained, with_bias=capped)
    softcap, scale = (5.0, 0.7) if capped else (None, 1.0)
    budget_bytes = None if chunk_rows is None else chunk_rows * vocab * 4
    assert_as_exact_as_eager(
        lambda hidden, weight, bias: dispatch.linear_logprob(
            hidden, weight, target_N, bias, softcap, scale, mode=mode, budget_bytes=budget_bytes
        ),
        lambda hidden, weight, bias: eager(hidden, weight, bias, target_N, softcap, scale),
        tensors,
        torch.randn(num_rows, device=device),
    )


# The interpreter takes 10 ms per program, and a chunk is a launch.
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 70), st.integers(2, 80), st.sampled_from(checks.MODES))
def test_any_shape_chunk_and_mode(device, num_rows, vocab, hidden_size, chunk_rows, mode):
    hidden_NH, weight_VH, _, target_N = problem(num_rows, vocab, hidden_size, torch.float32, device)
    budget_bytes = chunk_rows * vocab * 4
    logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, mode=mode, budget_bytes=budget_bytes)
    expected_N = eager(hidden_NH, weight_VH, None, target_N)
    torch.testing.assert_close(logp_N, expected_N, atol=2e-5, rtol=1e-5)
    ours = torch.autograd.grad(logp_N.sum(), (hidden_NH, weight_VH))
    theirs = torch.autograd.grad(expected_N.sum(), (hidden_NH, weight_VH))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
def test_logits_of_ten_thousand(assert_as_exact_as_eager, device, mode):
    hidden_NH, weight_VH, _, target_N = problem(4, 100, 8, torch.float32, device)
    with torch.no_grad():
        hidden_NH *= 1e4 / (hidden_NH @ weight_VH.t()).abs().max()
    assert_as_exact_as_eager(
        lambda hidden, weight: dispatch.linear_logprob(hidden, weight, target_N, mode=mode),
        lambda hidden, weight: eager(hidden, weight, None, target_N),
        [hidden_NH, weight_VH],
        torch.ones(4, device=device),
    )


@pytest.mark.parametrize("mode", ["store", "fused"])
def test_half_precision_logits_are_not_rounded(device, mode):
    """Logits near 30: bf16 would round them by up to 0.06, and a sequence of them by tenths of a nat."""
    hidden_NH, weight_VH, _, target_N = problem(64, 200, 64, torch.bfloat16, device)
    with torch.no_grad():
        hidden_NH *= 4
    truth_N = eager(hidden_NH.double(), weight_VH.double(), None, target_N)
    assert (eager(hidden_NH, weight_VH, None, target_N) - truth_N).abs().max() > 1e-2
    assert (dispatch.linear_logprob(hidden_NH, weight_VH, target_N, mode=mode) - truth_N).abs().max() < 1e-4


def test_strided_inputs_unaligned_targets_and_expanded_gradient(device):
    hidden_NH = torch.randn(40, 9, device=device).t()[1:, 2:34].requires_grad_()
    weight_VH = torch.randn(40, 101, device=device).t()[:, 3:35].requires_grad_()
    target_N = torch.randint(101, (9,), device=device)[1:]
    logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N)
    expected_N = eager(hidden_NH, weight_VH, None, target_N)
    torch.testing.assert_close(logp_N, expected_N)
    one = torch.ones((), device=device).expand(8)
    inputs = (hidden_NH, weight_VH)
    torch.testing.assert_close(
        torch.autograd.grad(logp_N, inputs, one), torch.autograd.grad(expected_N, inputs, one), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(device, dtype, mode):
    hidden_NH, weight_VH, _, target_N = problem(7, 500, 16, dtype, device)

    def once() -> list[Tensor]:
        logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, mode=mode)
        return [logp_N, *torch.autograd.grad(logp_N.sum(), (hidden_NH, weight_VH))]

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_chunks_and_row_order_change_nothing(device, trained):
    hidden_NH, weight_VH, _, target_N = problem(10, 300, 16, torch.float32, device, trained)
    coefficient_N = torch.randn(10, device=device)
    order = torch.randperm(10, device=device)

    def run(rows: Tensor, chunk_rows: int) -> list[Tensor]:
        logp_N = dispatch.linear_logprob(hidden_NH[rows], weight_VH, target_N[rows], budget_bytes=chunk_rows * 300 * 4)
        inputs = [tensor for tensor in (hidden_NH, weight_VH) if tensor.requires_grad]
        return [logp_N, *torch.autograd.grad(logp_N, inputs, coefficient_N[rows])]

    whole = run(torch.arange(10, device=device), 10)
    for rows, chunk_rows in ((torch.arange(10, device=device), 1), (torch.arange(10, device=device), 3), (order, 4)):
        other = run(rows, chunk_rows)
        torch.testing.assert_close(other[0], whole[0][rows], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(other[1:], whole[1:], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk_rows", [8, 2])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_weight_that_zero3_takes_away_between_forward_and_backward(device, trained, chunk_rows):
    """ZeRO-3 empties the parameter after forward and gathers it, into new memory, before backward."""
    hidden_NH, weight_VH, _, target_N = problem(8, 50, 16, torch.float32, device, trained)
    inputs = [tensor for tensor in (hidden_NH, weight_VH) if tensor.requires_grad]
    expected = torch.autograd.grad(eager(hidden_NH, weight_VH, None, target_N).sum(), inputs)
    logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, budget_bytes=chunk_rows * 50 * 4)
    gathered = weight_VH.data.clone()
    weight_VH.data.fill_(float("nan"))  # a view kept from the forward would read this
    weight_VH.data = torch.empty(0, device=device)
    weight_VH.data = gathered
    torch.testing.assert_close(torch.autograd.grad(logp_N.sum(), inputs), expected, atol=3e-6, rtol=1e-5)


def test_gradient_of_the_hidden_states_alone_from_a_trained_head(device):
    hidden_NH, weight_VH, bias_V, target_N = problem(5, 50, 16, torch.float32, device, with_bias=True)
    logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, bias_V)
    expected = torch.autograd.grad(eager(hidden_NH, weight_VH, bias_V, target_N).sum(), hidden_NH)
    torch.testing.assert_close(torch.autograd.grad(logp_N.sum(), hidden_NH), expected, atol=3e-6, rtol=1e-5)


def test_tied_embedding_gets_both_gradients(device):
    _, weight_VH, _, target_N = problem(6, 50, 16, torch.float32, device)
    ours = dispatch.linear_logprob(weight_VH[target_N.flip(0)], weight_VH, target_N)
    theirs = eager(weight_VH[target_N.flip(0)], weight_VH, None, target_N)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), weight_VH), torch.autograd.grad(theirs.sum(), weight_VH), atol=1e-5, rtol=1e-4
    )


def test_autocast_computes_in_half_precision_and_returns_full_gradients(device):
    hidden_NH, weight_VH, _, target_N = problem(6, 50, 16, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N)
    rounded = eager(hidden_NH.bfloat16().double(), weight_VH.bfloat16().double(), None, target_N)
    torch.testing.assert_close(logp_N, rounded.float(), atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(logp_N.sum(), (hidden_NH, weight_VH))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    expected = torch.autograd.grad(rounded.sum(), (hidden_NH, weight_VH))
    torch.testing.assert_close(grads, expected, atol=3e-2, rtol=3e-2)


def test_no_grad_leaves_no_graph(device):
    hidden_NH, weight_VH, _, target_N = problem(3, 50, 16, torch.float32, device)
    with torch.no_grad():
        assert not dispatch.linear_logprob(hidden_NH, weight_VH, target_N).requires_grad


@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
def test_torch_compile_keeps_one_graph(device, mode):
    hidden_NH, weight_VH, _, target_N = problem(5, 50, 16, torch.float32, device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return dispatch.linear_logprob(hidden.tanh(), weight, target_N, mode=mode).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden_NH, weight_VH), loss(hidden_NH, weight_VH))
    ours = torch.autograd.grad(compiled(hidden_NH, weight_VH), (hidden_NH, weight_VH))
    torch.testing.assert_close(ours, torch.autograd.grad(loss(hidden_NH, weight_VH), (hidden_NH, weight_VH)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_NH": torch.zeros(2, 3, 4)}, r"hidden_NH has shape \(2, 3, 4\)"),
        ({"hidden_NH": torch.zeros(2, 5)}, "differ in H"),
        ({"hidden_NH": torch.zeros(2, 4, dtype=torch.int64)}, "hidden_NH has dtype torch.int64"),
        ({"weight_VH": torch.zeros(0)}, "under ZeRO-3"),
        ({"weight_VH": torch.zeros(6, 4, dtype=torch.bfloat16)}, "or run under autocast"),
        ({"target_N": torch.zeros(3, dtype=torch.int64)}, "target_N has shape"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), expected \(6,\)"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"budget_bytes": 0}, "budget_bytes is 0"),
        ({"mode": "fast"}, "mode is 'fast': use one of auto, store, fused, recompute"),
    ],
)
def test_bad_arguments_name_value_and_fix(device, change, message):
    arguments = {
        "hidden_NH": torch.zeros(2, 4),
        "weight_VH": torch.zeros(6, 4),
        "target_N": torch.zeros(2, dtype=torch.int64),
    } | change
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        dispatch.linear_logprob(**moved)


def test_target_outside_the_vocabulary(device):
    hidden_NH, weight_VH = torch.zeros(2, 4, device=device), torch.zeros(6, 4, device=device)
    target_N = torch.tensor([0, 6], device=device)
    if device.type == "cuda":
        assert dispatch.linear_logprob(hidden_NH, weight_VH, target_N).isnan().tolist() == [False, True]
    else:
        with pytest.raises(ValueError, match="target_N holds 6, outside"):
            dispatch.linear_logprob(hidden_NH, weight_VH, target_N)


@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_row_with_target_minus_100_counts_for_nothing(device, mode, trained):
    hidden_NH, weight_VH, _, target_N = problem(7, 301, 24, torch.float32, device, trained)
    kept = torch.tensor([0, 2, 3, 6], device=device)
    ignoring_N = torch.full_like(target_N, checks.IGNORED_TARGET)
    ignoring_N[kept] = target_N[kept]
    inputs = [tensor for tensor in (hidden_NH, weight_VH) if tensor.requires_grad]
    logp_N, entropy_N, argmax_N, collision_N = dispatch.linear_logprob(
        hidden_NH, weight_VH, ignoring_N, mode=mode, statistics=True
    )
    expected_n = eager(hidden_NH[kept], weight_VH, None, target_N[kept])
    torch.testing.assert_close(logp_N[kept], expected_n)
    left_out = ignoring_N == checks.IGNORED_TARGET
    for value_N, masked in ((logp_N, 0.0), (entropy_N, 0.0), (argmax_N, -1), (collision_N, 0.0)):
        assert value_N[left_out].tolist() == [masked] * 3
    ours, theirs = torch.autograd.grad(logp_N.sum(), inputs), torch.autograd.grad(expected_n.sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(*pairwise(dtype=DTYPES, mode=["store", "fused"], size=[1, 1000.0]), ids=str)
def test_entropy_argmax_and_collision(device, dtype, mode, size):
    hidden_NH, weight_VH, _, target_N = problem(6, 5003, 24, dtype, device)
    hidden_NH = hidden_NH.detach() * size
    logp_N, entropy_N, argmax_N, collision_N = dispatch.linear_logprob(
        hidden_NH, weight_VH, target_N, mode=mode, statistics=True
    )
    logits_NV = hidden_NH.double() @ weight_VH.double().t()
    expected_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    torch.testing.assert_close(entropy_N.double(), expected_N, atol=1e-4 * size**0.5, rtol=1e-4)
    assert torch.equal(argmax_N, logits_NV.argmax(1))
    # log sum_v p_v^2, written out.
    expected_N = logits_NV.softmax(1).square().sum(1).log()
    torch.testing.assert_close(collision_N.double(), expected_N, atol=1e-5 if size == 1 else 1e-3, rtol=1e-5)
    plain_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, mode=mode)
    # Another kernel on CUDA, whose sums the compiler may fuse otherwise: a unit in the last place.
    torch.testing.assert_close(logp_N, plain_N, atol=0, rtol=3e-7 if device.type == "cuda" else 0)
    assert logp_N.requires_grad and not entropy_N.requires_grad and not collision_N.requires_grad


@pytest.mark.parametrize("mode", ["store", "fused"])
def test_a_logit_of_minus_infinity_has_no_probability(device, mode):
    hidden_NH, weight_VH, bias_V, target_N = problem(4, 600, 8, torch.float32, device, with_bias=True)
    with torch.no_grad():
        bias_V[:300] = -float("inf")
    target_N = target_N % 300 + 300
    logp_N, entropy_N, _, collision_N = dispatch.linear_logprob(
        hidden_NH, weight_VH, target_N, bias_V.detach(), mode=mode, statistics=True
    )
    expected_N = eager(hidden_NH, weight_VH[300:], bias_V[300:], target_N - 300)
    torch.testing.assert_close(logp_N, expected_N)
    assert entropy_N.isfinite().all()
    shares_NV = torch.softmax(hidden_NH.detach() @ weight_VH.detach()[300:].t() + bias_V.detach()[300:], dim=1)
    torch.testing.assert_close(collision_N, shares_NV.square().sum(1).log())
    # Gradient too: a tile of only -inf must not make it NaN.
    assert torch.autograd.grad(logp_N.sum(), hidden_NH)[0].isfinite().all()


@pytest.mark.parametrize("mode", ["store", "recompute", "fused"])
def test_statistics_of_chunks_and_of_no_rows(device, mode):
    """A uniform distribution over V tokens has entropy log V and collision -log V."""
    hidden_NH, weight_VH = torch.zeros(5, 8, device=device), torch.ones(301, 8, device=device)
    target_N = torch.tensor([0, 300, 7, -100, 9], device=device)
    outputs = dispatch.linear_logprob(
        hidden_NH, weight_VH, target_N, mode=mode, budget_bytes=2 * 301 * 4, statistics=True
    )
    uniform_N = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], device=device) * math.log(301)
    for value_N, expected_N in zip(
        (outputs[0], outputs[1], outputs[3]), (-uniform_N, uniform_N, -uniform_N), strict=True
    ):
        torch.testing.assert_close(value_N, expected_N)
    empty = dispatch.linear_logprob(hidden_NH[:0], weight_VH, target_N[:0], mode=mode, statistics=True)
    assert [value_N.shape for value_N in empty] == [(0,)] * 4 and empty[2].dtype is torch.int64


def test_fused_rows_have_the_same_bits_in_any_company(device):
    """Each row is summed in a fixed order, so neither order nor number of rows matters."""
    hidden_NH, weight_VH, _, target_N = problem(150, 700, 40, torch.bfloat16, device, trained=False)
    with torch.no_grad():
        whole_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, mode="fused")
        order = torch.randperm(150, device=device)
        shuffled_N = dispatch.linear_logprob(hidden_NH[order], weight_VH, target_N[order], mode="fused")
    if device.type == "cuda":
        assert torch.equal(shuffled_N, whole_N[order])
    else:  # the products are then a CPU library's, which treats the rows of a block differently
        torch.testing.assert_close(shuffled_N, whole_N[order], atol=2e-6, rtol=1e-6)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("needs", "rows", "budget", "expected"),
    [
        # (hidden, head) need a gradient; expected (mode, rows per chunk, keeps D @ W, keeps D); bf16, V = 32,768:
        # a row of logits takes 128 KiB, a row of D 64 KiB.
        ((False, False), 2048, 256 * MIB, ("fused", 2048, False, False)),
        ((True, False), 2048, 384 * MIB, ("store", 2048, True, False)),
        ((True, False), 2048, 192 * MIB, ("store", 1024, True, False)),
        ((True, True), 2048, 384 * MIB, ("store", 2048, False, True)),
        ((True, True), 2048, 192 * MIB, ("store", 512, False, True)),
        ((True, True), 2048, 128 * MIB, ("recompute", 512, False, False)),
        ((False, True), 2048, 128 * MIB, ("recompute", 512, False, False)),
    ],
)
def test_auto_chooses_by_gradient_need_and_bytes(needs, rows, budget, expected):
    size, kind = (rows, 32768), (torch.bfloat16, torch.device("cpu"))
    plan = head.plan_head("auto", *size, *kind, *needs, budget, "fused")
    mode, step, keeps_hidden_grad, keeps_dlogits = expected
    assert (plan.mode, plan.keeps_hidden_grad, plan.keeps_dlogits) == (mode, keeps_hidden_grad, keeps_dlogits)
    if mode != "fused":
        assert plan.step == step
        chunk_bytes = plan.step * 32768 * (4 + (0 if keeps_dlogits else 2))
        assert chunk_bytes + (rows * 32768 * 2 if keeps_dlogits else 0) <= budget


@pytest.mark.parametrize(
    ("hidden", "weight", "mode", "chunk_rows", "gemms"),
    [
        (False, False, "auto", 8, 1),
        (True, False, "auto", 8, 2),
        (True, False, "auto", 3, 2),
        (True, True, "auto", 8, 3),
        (False, True, "auto", 8, 2),
        (True, True, "auto", 3, 4),
        (True, True, "store", 3, 3),
        (True, False, "recompute", 8, 3),
        (True, False, "fused", 8, 3),
        (True, True, "fused", 8, 4),
    ],
)
def test_flops_are_those_of_the_gradients_asked_for(device, hidden, weight, mode, chunk_rows, gemms):
    """A frozen head needs no weight gradient; tensors that are not saved cost a recomputation of the logits."""
    hidden_NH = torch.randn(8, 16, device=device, requires_grad=hidden)
    weight_VH = torch.randn(50, 16, device=device, requires_grad=weight)
    target_N = torch.randint(50, (8,), device=device)
    # A counter includes only operations imported before it was created.
    dispatch.linear_logprob(hidden_NH, weight_VH, target_N)
    with FlopCounterMode(display=False) as counter:
        logp_N = dispatch.linear_logprob(hidden_NH, weight_VH, target_N, mode=mode, budget_bytes=chunk_rows * 50 * 4)
        if logp_N.requires_grad:
            logp_N.sum().backward()
    assert counter.get_total_flops() == gemms * 2 * 8 * 50 * 16
