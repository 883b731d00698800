"""Log-probs of a second target at the same hidden state.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bpo_kernels import dispatch
from bpo_kernels.bench.measure import peak_extra_bytes
from tests.pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of the sum of both gradients of the hidden states in their dtype, relative to the largest.
GRADIENT_STEP = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def problem(num_rows, vocab, hidden_size, dtype, device, trained=True, with_bias=False) -> dict[str, Any]:
    """Log-probs, hidden states, weight, bias and both targets; in rows 0 and 1 the targets are equal."""
    weight_VH = (3 * torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    target_N = torch.randint(vocab, (num_rows,), device=device)
    second_N = torch.randint(vocab, (num_rows,), device=device)
    second_N[:2] = target_N[:2]
    return {
        "logp_N": (-5 * torch.rand(num_rows, device=device)).requires_grad_(),
        "hidden_NH": torch.randn(num_rows, hidden_size, device=device).to(dtype).requires_grad_(),
        "weight_VH": weight_VH.requires_grad_(trained),
        "target_N": target_N,
        "second_N": second_N,
        "bias": torch.randn(vocab, device=device).to(dtype).requires_grad_(trained) if with_bias else None,
    }


def by_definition(inputs: dict[str, Any], softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """`logp + z(second) - z(target)` in fp64, from all logits; 0 for masked rows."""
    bias_V = None if inputs["bias"] is None else inputs["bias"].double()
    logits_NV = scale * F.linear(inputs["hidden_NH"].double(), inputs["weight_VH"].double(), bias_V)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    target_N, second_N = inputs["target_N"], inputs["second_N"]
    z_N, second_z_N = (logits_NV.gather(1, index.long().clamp(min=0)[:, None])[:, 0] for index in (target_N, second_N))
    masked_N = (target_N == -100) | (second_N == -100)
    return (inputs["logp_N"].double() + second_z_N - z_N).masked_fill(masked_N, 0.0)


def wanted(inputs: dict[str, Any]) -> list[Tensor]:
    tensors = (inputs[name] for name in ("logp_N", "hidden_NH", "weight_VH", "bias"))
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


@pytest.mark.parametrize(
    *pairwise(
        dtype=DTYPES,
        trained=[True, False],
        capped=[False, True],
        masked=[False, True],
        shape=[(0, 31, 7), (1, 31, 7), (5, 4099, 33), (9, 3, 600)],
    ),
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition(device, dtype, trained, capped, masked, shape):
    num_rows, vocab, hidden_size = shape
    inputs = problem(num_rows, vocab, hidden_size, dtype, device, trained, with_bias=capped)
    if masked:
        inputs["target_N"][2:3] = -100
        inputs["second_N"][3:5] = -100
    options = {"softcap": 5.0, "scale": 0.7} if capped else {}
    ours_N, truth_N = dispatch.second_target_logprob(**inputs, **options), by_definition(inputs, **options)
    assert (ours_N.shape, ours_N.dtype) == ((num_rows,), torch.float32)
    torch.testing.assert_close(ours_N.double(), truth_N, atol=1e-5, rtol=1e-5)
    coefficient_N = torch.randn(num_rows, device=device)
    tensors = wanted(inputs)
    assert len(tensors) == 2 + trained * (1 + capped)
    ours = torch.autograd.grad(ours_N, tensors, coefficient_N)
    truth = torch.autograd.grad(truth_N, tensors, coefficient_N.double())
    assert [grad.dtype for grad in ours] == [tensor.dtype for tensor in tensors]
    for grad, true_grad in zip(ours, truth, strict=True):
        largest = float(true_grad.abs().max()) if true_grad.numel() else 0.0
        torch.testing.assert_close(grad, true_grad, atol=GRADIENT_STEP[dtype] * max(largest, 1e-3), rtol=0)


@pytest.mark.parametrize(*pairwise(dtype=DTYPES, trained=[True, False], mode=["store", "recompute", "fused"]), ids=str)
def test_it_is_the_log_prob_that_the_head_gives_the_second_target(device, dtype, trained, mode):
    """Without a second head; the gradients of both are summed in the dtype of the hidden states."""
    inputs = problem(6, 301, 40, dtype, device, trained)
    del inputs["logp_N"]
    head = (inputs["hidden_NH"], inputs["weight_VH"])
    logp_N = dispatch.linear_logprob(*head, inputs["target_N"], mode=mode)
    ours_N = dispatch.second_target_logprob(logp_N, **inputs)
    theirs_N = dispatch.linear_logprob(*head, inputs["second_N"], mode=mode)
    torch.testing.assert_close(ours_N, theirs_N, atol=1e-5, rtol=1e-5)
    tensors = [tensor for tensor in head if tensor.requires_grad]
    for grad, other in zip(
        torch.autograd.grad(ours_N.sum(), tensors), torch.autograd.grad(theirs_N.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(grad, other, atol=4 * GRADIENT_STEP[dtype] * float(other.abs().max()), rtol=0)


def test_the_same_token_keeps_its_log_prob_to_the_bit_and_adds_no_gradient(device):
    """Gradients that cancel in exact arithmetic: sums over rows that share a token would leave their rounding."""
    inputs = problem(20, 2, 16, torch.float32, device, with_bias=True)
    inputs["second_N"] = inputs["target_N"].clone()
    with torch.no_grad():
        inputs["logp_N"][:4] = torch.tensor([-1.1, -0.0, -float("inf"), 0.0])
        inputs["hidden_NH"][3] = float("inf")  # infinite logits, whose difference would be NaN
    result_N = dispatch.second_target_logprob(**inputs)
    bits = [tensor.detach().view(torch.int32).tolist() for tensor in (result_N, inputs["logp_N"])]
    assert bits[0] == bits[1]
    coefficient_N = torch.randn(20, device=device)
    inputs["hidden_NH"].data[3] = 0.0
    result_N = dispatch.second_target_logprob(**inputs)
    grad_logp_N, *others = torch.autograd.grad(result_N, wanted(inputs), coefficient_N)
    assert torch.equal(grad_logp_N, coefficient_N)
    assert len(others) == 3 and not any(grad.any() for grad in others)


def test_a_masked_row_is_0_and_has_no_gradient_even_of_its_log_prob(device):
    inputs = problem(5, 50, 16, torch.float32, device, with_bias=True)
    inputs["target_N"][1] = inputs["second_N"][1] = inputs["target_N"][2] = inputs["second_N"][3] = -100
    with torch.no_grad():
        inputs["logp_N"][1:4] = float("nan")
    result_N = dispatch.second_target_logprob(**inputs)
    assert result_N[1:4].tolist() == [0.0] * 3 and (result_N[[0, 4]] < 0).any()
    coefficient_N = torch.tensor([1.0, float("nan"), float("inf"), 2.0, 3.0], device=device)
    grads = torch.autograd.grad(result_N, wanted(inputs), coefficient_N)
    assert grads[0].tolist() == [1.0, 0.0, 0.0, 0.0, 3.0]
    assert not grads[1][:4].any() and grads[1][4].all()
    assert all(grad.isfinite().all() for grad in grads)


def test_only_the_gradients_asked_for_are_computed(device, on_triton):
    """A frozen head has no [V, H] gradient, constant hidden states read no weight in the backward."""
    for hidden, weight, flops in ((True, False, 8), (True, True, 12), (False, True, 8), (False, False, 4)):
        inputs = problem(6, 50, 16, torch.float32, device)
        inputs["hidden_NH"].requires_grad_(hidden)
        inputs["weight_VH"].requires_grad_(weight)
        # A counter includes only operations imported before it was created.
        dispatch.second_target_logprob(**inputs)
        with FlopCounterMode(display=False) as counter:
            dispatch.second_target_logprob(**inputs).sum().backward()
        assert [inputs[name].grad is not None for name in ("hidden_NH", "weight_VH")] == [hidden, weight]
        assert inputs["logp_N"].grad.tolist() == [1.0] * 6
        if on_triton:  # plain PyTorch has no product that the counter knows
            assert counter.get_total_flops() == flops * 6 * 16


def test_a_frozen_head_takes_no_memory_of_its_size(device):
    for trained in (True, False):
        inputs = problem(4, 20_000, 32, torch.float32, device, trained)
        extra = peak_extra_bytes(
            lambda inputs=inputs: dispatch.second_target_logprob(**inputs).sum().backward(), device
        )
        assert (extra > inputs["weight_VH"].numel()) == trained


def test_log_probs_without_a_gradient(device):
    inputs = problem(3, 50, 16, torch.float32, device)
    inputs["logp_N"] = inputs["logp_N"].detach()
    result_N = dispatch.second_target_logprob(**inputs)
    grads = torch.autograd.grad(result_N.sum(), [inputs["hidden_NH"], inputs["weight_VH"]])
    truth = torch.autograd.grad(by_definition(inputs).sum(), [inputs["hidden_NH"], inputs["weight_VH"]])
    torch.testing.assert_close(grads, truth)
    with torch.no_grad():
        assert not dispatch.second_target_logprob(**inputs).requires_grad


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_weight_that_zero3_takes_away_between_forward_and_backward(device, trained):
    """ZeRO-3 empties the parameter after forward and gathers it, into new memory, before backward."""
    inputs = problem(6, 50, 16, torch.float32, device, trained)
    truth = torch.autograd.grad(by_definition(inputs).sum(), wanted(inputs))
    result_N = dispatch.second_target_logprob(**inputs)
    weight_VH = inputs["weight_VH"]
    gathered = weight_VH.data.clone()
    weight_VH.data.fill_(float("nan"))  # a view kept from the forward would read this
    weight_VH.data = torch.empty(0, device=device)
    weight_VH.data = gathered
    torch.testing.assert_close(torch.autograd.grad(result_N.sum(), wanted(inputs)), truth, atol=1e-5, rtol=1e-5)


def test_strided_inputs_unaligned_targets_and_expanded_gradient(device):
    inputs = problem(9, 101, 40, torch.float32, device)
    view = {
        "logp_N": torch.stack([inputs["logp_N"].detach()] * 2, dim=1)[1:, 0].requires_grad_(),
        "hidden_NH": inputs["hidden_NH"].detach().t().contiguous().t()[1:, 3:35].requires_grad_(),
        "weight_VH": inputs["weight_VH"].detach()[:, 5:37].requires_grad_(),
        "target_N": inputs["target_N"].int()[1:],
        "second_N": torch.stack([inputs["second_N"]] * 2, dim=1)[1:, 0],
        "bias": None,
    }
    result_N, truth_N = dispatch.second_target_logprob(**view), by_definition(view)
    torch.testing.assert_close(result_N.double(), truth_N, atol=1e-5, rtol=1e-5)
    one = torch.ones((), device=device).expand(8)
    ours = torch.autograd.grad(result_N, wanted(view), one)
    torch.testing.assert_close(ours, torch.autograd.grad(truth_N, wanted(view), one.double()), atol=1e-5, rtol=1e-5)


def test_same_bits_twice_with_many_rows_of_one_token(device):
    inputs = problem(60, 4, 24, torch.bfloat16, device, with_bias=True)

    def once() -> list[Tensor]:
        result_N = dispatch.second_target_logprob(**inputs)
        return [result_N, *torch.autograd.grad(result_N.sum(), wanted(inputs))]

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


def test_autocast_rounds_as_the_head_does_and_returns_full_gradients(device, on_triton):
    inputs = problem(6, 50, 16, torch.float32, device)
    if on_triton:  # whose interpreter rounds to bf16 by truncation
        inputs["weight_VH"].data.copy_(inputs["weight_VH"].bfloat16())
    rounded = inputs | {name: inputs[name].bfloat16().double() for name in ("hidden_NH", "weight_VH")}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result_N = dispatch.second_target_logprob(**inputs)
    torch.testing.assert_close(result_N.double(), by_definition(rounded), atol=1e-5, rtol=1e-5)
    tensors = [inputs["hidden_NH"], inputs["weight_VH"]]
    grads = torch.autograd.grad(result_N.sum(), tensors)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    truth = torch.autograd.grad(by_definition(inputs).sum(), tensors)
    torch.testing.assert_close(grads, truth, atol=3e-2, rtol=3e-2)


def test_torch_compile_keeps_one_graph(device):
    inputs = problem(5, 50, 16, torch.float32, device, with_bias=True)
    targets = (inputs["target_N"], inputs["second_N"])

    def loss(logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dispatch.second_target_logprob(logp, hidden.tanh(), weight, *targets, bias, 4.0, 0.5).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = wanted(inputs)
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    ours = torch.autograd.grad(compiled(*tensors), tensors)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(*tensors), tensors))


def test_target_outside_the_vocabulary(device):
    inputs = problem(3, 6, 4, torch.float32, device)
    inputs["second_N"] = torch.tensor([0, 6, 0], device=device)
    inputs["target_N"] = torch.tensor([0, 1, 1], device=device)
    if device.type == "cuda":
        assert dispatch.second_target_logprob(**inputs).isnan().tolist() == [False, True, False]
    else:
        with pytest.raises(ValueError, match="second_N holds 6, outside"):
            dispatch.second_target_logprob(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp_N": torch.zeros(3)}, r"logp_N has shape \(3,\), but there are 2 rows"),
        ({"logp_N": torch.zeros(2, dtype=torch.bfloat16)}, "logp_N is torch.bfloat16, expected torch.float32"),
        ({"hidden_NH": torch.zeros(2, 5)}, "differ in H"),
        ({"weight_VH": torch.zeros(0)}, "under ZeRO-3"),
        ({"second_N": torch.zeros(3, dtype=torch.int64)}, "second_N has shape"),
        ({"second_N": torch.zeros(2)}, "second_N has dtype torch.float32"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), expected \(6,\)"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
)
def test_bad_arguments_name_value_and_fix(device, change, message):
    arguments = {
        "logp_N": torch.zeros(2),
        "hidden_NH": torch.zeros(2, 4),
        "weight_VH": torch.zeros(6, 4),
        "target_N": torch.zeros(2, dtype=torch.int64),
        "second_N": torch.zeros(2, dtype=torch.int64),
    } | change
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        dispatch.second_target_logprob(**moved)
