"""Head and preference loss together.

Legend: N rows (response tokens), H hidden size, V vocabulary, P pairs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bpo_kernels import dispatch, plain
from tests.pairwise import pairwise

LENGTHS = (3, 1, 4, 2)
# Two groups: three completions with all pairs, and one completion in no pair.
PAIRS = ((0, 1), (0, 2), (1, 2))


def problem(device, dtype=torch.float32, trained=True, vocab=131, hidden_size=24, lengths=LENGTHS) -> dict[str, Any]:
    num_rows = sum(lengths)
    completion_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    starts_K1 = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    weight_VH = 3 * torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5
    return {
        "hidden_NH": torch.randn(num_rows, hidden_size, device=device).to(dtype).requires_grad_(),
        "weight_VH": weight_VH.to(dtype).requires_grad_(trained),
        "target_N": torch.randint(vocab, (num_rows,), device=device),
        "completion_of_token_N": completion_N,
        "completion_starts_K1": starts_K1,
        "pairs_P2": torch.tensor(PAIRS, device=device),
        "num_completions": len(lengths),
    }


def separately(inputs: dict[str, Any], reference_N: Tensor, beta: float, **options: Any) -> tuple[Tensor, ...]:
    """The same from eager PyTorch: logits of all rows, log-softmax, the loss of the plain twin."""
    logits_NV = (inputs["hidden_NH"] @ inputs["weight_VH"].t()).to(
        torch.promote_types(reference_N.dtype, torch.float32)
    )
    logp_N = torch.log_softmax(logits_NV, -1).gather(1, inputs["target_N"][:, None])[:, 0]
    pairs = (inputs["completion_of_token_N"], inputs["pairs_P2"])
    return *plain.preference_loss(logp_N, reference_N, *pairs, beta, **options), logp_N


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of the losses and of an additional likelihood term."""
    wanted = [tensor for tensor in (inputs["hidden_NH"], inputs["weight_VH"]) if tensor.requires_grad]
    losses_P, logp_N = outputs[0], outputs[3]
    weight_P = torch.arange(1.0, losses_P.numel() + 1, device=losses_P.device)
    return torch.autograd.grad((losses_P * weight_P).sum() - 0.3 * logp_N.sum(), wanted)


@pytest.mark.parametrize(
    *pairwise(
        loss_type=["sigmoid", "hinge", "ipo", "robust"],
        mode=["auto", "store", "recompute", "fused"],
        trained=[True, False],
        factors=[False, True],
    )
)
def test_stored_reference_equals_head_and_loss_apart(device, loss_type, mode, trained, factors):
    inputs = problem(device, trained=trained)
    if factors:
        inputs["pairs_P2"] = torch.tensor([(0, 1), (0, -1), (-1, 2)], device=device)
    reference_N = -3 * torch.rand(sum(LENGTHS), device=device)
    options = {"loss_type": loss_type, "token_weight_N": torch.rand(sum(LENGTHS), device=device)}
    if loss_type in ("sigmoid", "robust"):
        options["label_smoothing"] = 0.1
    if factors:
        options["pair_beta_P"] = torch.tensor([1.0, 0.5, 3.0], device=device)
        options["pair_weight_P"] = torch.tensor([2.0, 0.0, 0.25], device=device)
    ours = dispatch.linear_preference_loss(
        **inputs, reference=reference_N, beta=0.3, mode=mode, budget_bytes=131 * 4 * 3, **options
    )
    theirs = separately(inputs, reference_N, 0.3, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(*pairwise(own_head=[False, True], chunk_rows=[None, 3], trained=[True, False]))
def test_live_reference_is_a_constant(device, own_head, chunk_rows, trained):
    inputs = problem(device, trained=trained)
    other = problem(device)
    live_NH = other["hidden_NH"]
    weight_VH = other["weight_VH"] if own_head else inputs["weight_VH"]
    reference_N = dispatch.linear_logprob(live_NH, weight_VH, inputs["target_N"]).detach()
    budget_bytes = None if chunk_rows is None else chunk_rows * 131 * 4
    ours = dispatch.linear_preference_loss(
        **inputs,
        reference=live_NH,
        reference_weight_VH=weight_VH if own_head else None,
        beta=0.3,
        budget_bytes=budget_bytes,
    )
    theirs = separately(inputs, reference_N, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-5, rtol=1e-4)
    assert live_NH.grad is None
    with pytest.raises(RuntimeError, match="not.*used in the graph"):
        torch.autograd.grad(ours[0].sum(), live_NH, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_policy_equal_to_the_live_reference_gives_exactly_log_2(device, dtype, trained):
    inputs = problem(device, dtype, trained)
    losses_P, chosen_P, rejected_P, _ = dispatch.linear_preference_loss(
        **inputs, reference=inputs["hidden_NH"].detach(), beta=0.1
    )
    expected = torch.tensor(math.log(2), dtype=torch.float32).item()
    assert losses_P.tolist() == [expected] * len(PAIRS)
    assert chosen_P.tolist() == rejected_P.tolist() == [0.0] * len(PAIRS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_half_precision_is_as_exact_as_eager(assert_as_exact_as_eager, device, dtype, trained):
    inputs = problem(device, dtype, trained)
    reference_N = -3 * torch.rand(sum(LENGTHS), device=device)

    def ours(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        changed = inputs | {"hidden_NH": hidden_NH, "weight_VH": weight_VH}
        return dispatch.linear_preference_loss(**changed, reference=reference_N, beta=0.5)[0]

    def eager(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        changed = inputs | {"hidden_NH": hidden_NH, "weight_VH": weight_VH}
        return separately(changed, reference_N.to(torch.promote_types(hidden_NH.dtype, torch.float32)), 0.5)[0]

    tensors = [inputs["hidden_NH"], inputs["weight_VH"]]
    assert_as_exact_as_eager(ours, eager, tensors, torch.ones(len(PAIRS), device=device))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.integers(2, 200), st.integers(1, 40))
def test_any_lengths_and_head(device, lengths, vocab, hidden_size):
    inputs = problem(device, vocab=vocab, hidden_size=hidden_size, lengths=tuple(lengths))
    inputs["pairs_P2"] = torch.tensor([[0, i] for i in range(1, len(lengths))], device=device)
    reference_N = -torch.rand(sum(lengths), device=device)
    ours = dispatch.linear_preference_loss(**inputs, reference=reference_N, beta=0.2)
    theirs = separately(inputs, reference_N, 0.2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("reference_is", "trained", "mode", "gemms"),
    [
        ("stored", False, "auto", 2),
        ("live", True, "auto", 3),
        ("live-own-head", True, "recompute", 4),
        ("live-own-head", False, "auto", 2),
    ],
)
def test_flops_are_those_of_the_gradients_asked_for(device, reference_is, trained, mode, gemms):
    inputs = problem(device, trained=trained)
    reference_NH = torch.randn(sum(LENGTHS), 24, device=device)
    live = {"reference": reference_NH}
    given = {
        "stored": {"reference": reference_NH[:, 0]},
        "live": live,
        "live-own-head": live | {"reference_weight_VH": torch.randn(131, 24, device=device)},
    }
    # A counter includes only operations imported before it was created.
    dispatch.linear_preference_loss(**inputs, **given[reference_is], beta=0.2, mode=mode)
    with FlopCounterMode(display=False) as counter:
        outputs = dispatch.linear_preference_loss(**inputs, **given[reference_is], beta=0.2, mode=mode)
        gradients(outputs, inputs)
    assert counter.get_total_flops() == (gemms + (reference_is != "stored")) * 2 * sum(LENGTHS) * 131 * 24


@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_weight_that_zero3_takes_away_between_forward_and_backward(device, trained, mode):
    """ZeRO-3 empties the parameter after forward and gathers it, into new memory, before backward."""
    inputs = problem(device, trained=trained)
    reference_N = -torch.rand(sum(LENGTHS), device=device)
    expected = gradients(separately(inputs, reference_N, 0.2), inputs)
    outputs = dispatch.linear_preference_loss(**inputs, reference=reference_N, beta=0.2, mode=mode)
    weight_VH = inputs["weight_VH"]
    gathered = weight_VH.data.clone()
    weight_VH.data.fill_(float("nan"))  # a view kept from the forward would read this
    weight_VH.data = torch.empty(0, device=device)
    weight_VH.data = gathered
    torch.testing.assert_close(gradients(outputs, inputs), expected, atol=3e-6, rtol=1e-5)


def test_same_bits_twice(device):
    inputs = problem(device, torch.bfloat16)
    reference_N = -torch.rand(sum(LENGTHS), device=device)

    def once() -> list[Tensor]:
        outputs = dispatch.linear_preference_loss(**inputs, reference=reference_N, beta=0.2)
        return [*outputs, *gradients(outputs, inputs)]

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


def test_torch_compile_keeps_one_graph(device):
    inputs = problem(device)
    constant = {key: value for key, value in inputs.items() if key not in ("hidden_NH", "weight_VH")}
    reference_N = -torch.rand(sum(LENGTHS), device=device)

    factors = dict.fromkeys(("pair_beta_P", "pair_weight_P"), torch.tensor([0.5, 1.0, 2.0], device=device))

    def loss(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        outputs = dispatch.linear_preference_loss(
            hidden_NH.tanh(), weight_VH, reference=reference_N, beta=0.2, **constant, **factors
        )
        return outputs[0].sum() - outputs[3].mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = (inputs["hidden_NH"], inputs["weight_VH"])
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    ours = torch.autograd.grad(compiled(*tensors), tensors)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(*tensors), tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": torch.zeros(9)}, r"reference has shape \(9,\), but there are 10 rows"),
        ({"reference": torch.zeros(10, 23)}, "differ in H"),
        ({"reference": torch.zeros(10, dtype=torch.int64)}, "pass log-probs or hidden states"),
        ({"reference_weight_VH": torch.zeros(131, 24)}, "omit the head"),
        ({"completion_starts_K1": torch.tensor([0, 3, 4, 9, 10])}, "does not divide the tokens"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"pair_weight_P": torch.ones(2)}, r"pair_weight_P has shape \(2,\), pairs_P2 \(3, 2\)"),
        ({"loss_type": "dpo"}, "use one of sigmoid, hinge, ipo, robust"),
        ({"mode": "fast"}, "mode is 'fast'"),
    ],
)
def test_bad_arguments_name_value_and_fix(device, change, message):
    arguments = problem(device) | {"reference": torch.zeros(10), "beta": 0.1} | change
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    if device.type == "cuda" and "completion_starts_K1" in change:
        pytest.skip("offsets are not read on CUDA")
    with pytest.raises(ValueError, match=message):
        dispatch.linear_preference_loss(**moved)
