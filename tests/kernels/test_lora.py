"""`lora_linear`: outputs, gradients and dropout's mask, in plain PyTorch and (test_triton_interpreter.py) on Triton.

Legend: T rows, D features of the input, O of an output, r rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bpo_kernels import lora_operator
from bpo_kernels.dispatch import lora_linear
from bpo_kernels.philox import keep_mask, philox_words

SEED = 0x1234_5678_9ABC
# Allowed in addition to 1.1 times the error of eager PyTorch in the same dtype, relative to the largest true value.
# Triton's interpreter truncates to bf16, where a GPU rounds.
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 6e-3 if os.environ.get("TRITON_INTERPRET") == "1" else 2e-3}


@dataclass
class Layers:
    """The arguments of one call: x with leading dimensions, and a group of layers."""

    lead: tuple[int, ...]
    features: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    dropout: float = 0.0
    mode: str = "fused"
    scales: tuple[float, ...] = (2.0, 0.7, 1.0)
    biased: bool = True

    def tensors(self, device: torch.device) -> tuple[list[Tensor], ...]:
        """x; weights; biases; A; B, in fp32."""

        def matrices(sizes) -> list[Tensor]:
            return [(torch.randn(rows, columns) / columns**0.5).to(device) for rows, columns in sizes]

        x = torch.randn(*self.lead, self.features).to(device)
        weights = matrices((output, self.features) for output in self.outputs)
        biases = [torch.randn(output).to(device) for output in self.outputs]
        lora_a = matrices((rank, self.features) for rank in self.ranks)
        return [x], weights, biases, lora_a, matrices(zip(self.outputs, self.ranks, strict=True))


GROUPS = {
    "q k v": Layers((2, 9), 72, (40, 24, 24), (3, 8, 33), 0.3),
    "addmm, odd": Layers((17,), 33, (20, 9), (3, 3), 0.1, "addmm", (2.0, 2.0)),
    "one row": Layers((1,), 40, (24,), (8,), 0.3),
    "several tiles": Layers((40,), 32, (70, 8), (16, 80), 0.5, biased=False),
    "no dropout": Layers((5,), 24, (136, 8), (8, 9)),
    "no dropout, one scale": Layers((5,), 24, (12, 8), (4, 9), 0.0, "addmm", (0.5, 0.5)),
    "no rows": Layers((2, 0), 16, (8,), (4,), 0.3),
}


def eager(layers: Layers, x: Tensor, weights, biases, lora_a, lora_b) -> list[Tensor]:
    """PEFT's sequence, with the mask of `keep_mask`."""
    rows, dropped = x.reshape(-1, x.shape[-1]), x
    if layers.dropout:
        seed = torch.tensor([SEED], device=x.device)
        mask = keep_mask(*rows.shape, layers.dropout, seed, 7).view(x.shape)
        dropped = x * mask / (1 - layers.dropout)
    members = zip(weights, biases, lora_a, lora_b, layers.scales, strict=False)
    return [F.linear(x, w, bias) + F.linear(F.linear(dropped, a), b) * scale for w, bias, a, b, scale in members]


def ours(layers: Layers, x: Tensor, weights, biases, lora_a, lora_b, **options) -> tuple[Tensor, ...]:
    given = {"dropout": layers.dropout, "seed": torch.tensor([SEED], device=x.device), "stream": 7, "mode": layers.mode}
    scales = layers.scales[: len(weights)]
    return lora_linear(x, weights, biases, lora_a, lora_b, scales, **(given | options))


def run(operation, layers: Layers, dtype: torch.dtype, tensors, needs_x: bool = True) -> list[Tensor]:
    """Outputs, and gradients of x, A and B."""
    (x,), weights, biases, lora_a, lora_b = [[one.to(dtype) for one in part] for part in tensors]
    x.requires_grad_(needs_x)
    trained = [x] * needs_x + [one.requires_grad_() for one in (*lora_a, *lora_b)]
    outputs = operation(layers, x, weights, biases if layers.biased else [None] * len(weights), lora_a, lora_b)
    coefficients = torch.Generator(x.device).manual_seed(3)
    grads = [torch.randn(y.mT.shape, generator=coefficients, device=x.device).to(dtype).mT for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, trained, grads)]


def assert_exact(layers: Layers, dtype: torch.dtype, tensors, needs_x: bool = True) -> None:
    tensors = [[one.to(dtype).float() for one in part] for part in tensors]
    results = [
        run(operation, layers, used, tensors, needs_x)
        for operation, used in ((eager, torch.float64), (eager, dtype), (ours, dtype))
    ]
    for position, (true, rough, value) in enumerate(zip(*results, strict=True)):
        assert value.shape == true.shape and value.dtype == dtype
        if true.numel():
            error, allowed = float((value - true).abs().max()), 1.1 * float((rough - true).abs().max())
            allowed += EPSILON[dtype] * float(true.abs().max())
            assert error <= allowed, f"result {position}: error {error} > {allowed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", GROUPS)
def test_outputs_and_gradients_are_as_exact_as_peft(group, dtype, device):
    assert_exact(GROUPS[group], dtype, GROUPS[group].tensors(device))


def test_x_without_a_gradient_and_x_that_is_not_contiguous(device):
    layers = Layers((6, 4), 16, (8, 8), (4, 4), 0.3)
    (x,), *rest = layers.tensors(device)
    assert_exact(layers, torch.float32, ([x.transpose(0, 1)], *rest), needs_x=False)
    wide = torch.randn(6, 4, 48, device=device)
    assert_exact(layers, torch.float32, ([wide[..., 16:32]], *rest))


def test_an_output_that_is_not_used_has_no_part_in_the_gradients(device):
    layers = Layers((5,), 16, (8, 12), (4, 4), 0.3)
    tensors = layers.tensors(device)
    [x], *_, lora_a, lora_b = tensors
    for one in (x, *lora_a, *lora_b):
        one.requires_grad_()
    first, _ = ours(layers, x, *tensors[1:])
    first.sum().backward()
    (alone,) = eager(Layers((5,), 16, (8,), (4,), 0.3), x, *[part[:1] for part in tensors[1:]])
    expected = torch.autograd.grad(alone.sum(), [x, lora_a[0], lora_b[0]])
    for got, true in zip((x.grad, lora_a[0].grad, lora_b[0].grad), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)
    assert not lora_a[1].grad.any() and not lora_b[1].grad.any()


def mask_in_use(num_rows: int, features: int, device, *, dtype=torch.float32, seed=SEED, **options) -> Tensor:
    """The mask that `lora_linear` applies: A and B are identities and the base is 0."""
    eye = torch.eye(features, dtype=dtype, device=device)
    x = torch.ones(num_rows, features, dtype=dtype, device=device)
    seed = torch.tensor([seed], device=device)
    arguments = {"dropout": 0.25, "stream": 3} | options
    (y,) = lora_linear(x, [0 * eye], [None], [eye], [eye], [1.0], seed=seed, **arguments)
    kept = 1 / (1 - arguments["dropout"])
    assert ((y == 0) | ((y - kept).abs() < 1e-2)).all()
    return y != 0


@pytest.mark.parametrize(("num_rows", "features"), [(17, 40), (40, 72), (3, 8)])
def test_the_mask_is_that_of_the_twin_bit_for_bit(num_rows, features, device):
    twin = keep_mask(num_rows, features, 0.25, torch.tensor([SEED], device=device), 3)
    assert torch.equal(mask_in_use(num_rows, features, device), twin)


def test_the_mask_depends_on_seed_stream_and_position_alone(device):
    mask = mask_in_use(20, 24, device)
    assert torch.equal(mask, mask_in_use(20, 24, device, dtype=torch.bfloat16))
    assert torch.equal(mask, mask_in_use(20, 24, device, mode="addmm"))
    assert torch.equal(mask, mask_in_use(50, 24, device)[:20])
    for other in (mask_in_use(20, 24, device, stream=4), mask_in_use(20, 24, device, seed=SEED + 2**40)):
        assert 0.25 < float((mask == other).float().mean()) < 0.8  # 0.625 for independent masks


def test_the_gradient_of_x_uses_the_mask_of_the_forward(device):
    eye, seed = torch.eye(24, device=device), torch.tensor([SEED], device=device)
    x = torch.ones(20, 24, device=device, requires_grad=True)
    lora_linear(x, [0 * eye], [None], [eye], [eye], [1.0], dropout=0.25, seed=seed, stream=3)[0].sum().backward()
    assert torch.equal(x.grad != 0, mask_in_use(20, 24, device))


def test_known_answers_of_philox():
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    counter = [torch.tensor([word]) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    key = torch.tensor([0x299F31D0A4093822])
    assert [int(word) for word in philox_words(tuple(counter), key)] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    zero = torch.tensor([0])
    assert [int(word) for word in philox_words((zero,) * 4, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_masks_keep_the_right_share_and_are_independent():
    seed = torch.tensor([SEED])
    masks = [keep_mask(1000, 403, 0.05, seed + add, stream).double() for add, stream in ((0, 0), (0, 1), (1, 0))]
    for mask in masks:
        assert abs(float(mask.mean()) - 0.95) < 0.002  # 5.8 standard deviations
        assert float(mask.mean(0).min()) > 0.9 and float(mask.mean(1).min()) > 0.88
    pairs = [
        (masks[0], masks[1]),
        (masks[0], masks[2]),
        (masks[0][1:], masks[0][:-1]),
        (masks[0], masks[0].roll(101, 1)),
    ]
    for one, other in pairs:
        covariance = float(((one - 0.95) * (other - 0.95)).mean())
        assert abs(covariance) / (0.05 * 0.95) < 0.01


def test_gradcheck(on_triton):
    if on_triton:
        pytest.skip("Triton computes in fp32")
    layers = Layers((3,), 6, (5, 4), (2, 3), 0.3)
    (x,), weights, biases, lora_a, lora_b = [[one.double() for one in part] for part in layers.tensors("cpu")]

    def call(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        return ours(layers, x, weights, biases, adapters[:2], adapters[2:])

    assert torch.autograd.gradcheck(call, [one.requires_grad_() for one in (x, *lora_a, *lora_b)])


def test_saved_are_x_the_parameters_and_the_small_product(device):
    """No mask, no dropped copy of x, and parameters as themselves: ZeRO-3 gathers them again by identity."""
    layers = Layers((64,), 32, (48, 48), (4, 4), 0.3)
    tensors = layers.tensors(device)
    (x,), weights, biases, lora_a, lora_b = tensors
    for one in (x, *lora_a, *lora_b):
        one.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (saved.append(one), one)[1], lambda one: one):
        ours(layers, x, weights, biases, lora_a, lora_b)
    known = {id(one) for one in (x, *weights, *lora_a, *lora_b)}
    assert known <= {id(one) for one in saved}
    others = [one.shape for one in saved if id(one) not in known]
    assert len(others) == 2 and (1,) in others and max(shape.numel() for shape in others) <= 64 * 2 * 16


def test_a_recomputation_has_the_same_mask(device):
    layers = Layers((12,), 16, (8,), (4,), 0.5)
    tensors = layers.tensors(device)
    run_plain = run(ours, layers, torch.float32, tensors)

    def recomputed(*arguments) -> tuple[Tensor, ...]:
        return checkpoint(ours, *arguments, use_reentrant=False)

    again = run(recomputed, layers, torch.float32, tensors)
    assert all(torch.equal(one, other) for one, other in zip(run_plain, again, strict=True))


def test_torch_compile_sees_one_operator_in_each_direction(on_triton, device):
    if on_triton:
        pytest.skip("the same graph as in plain PyTorch")
    layers = Layers((12,), 16, (8, 4), (4, 4), 0.5)
    tensors = layers.tensors(device)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = [run(operation, layers, torch.float32, tensors) for operation in (ours, compiled)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with FlopCounterMode(display=False) as counter:
        run(ours, layers, torch.float32, tensors)
    flops = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    base, adapter = 2 * 12 * 16 * (8 + 4), 2 * 12 * 4 * ((16 + 8) + (16 + 4))
    assert flops == {"bpo.lora_forward": base + adapter, "bpo.lora_backward": base + 2 * adapter}


@pytest.mark.parametrize(("triton", "needs_x"), [(False, False), (False, True), (True, True)])
def test_shapes_without_data_are_those_with_data(triton, needs_x, on_triton, device):
    if triton != on_triton:
        pytest.skip("the other implementation's turn")
    layers = Layers((2, 3), 16, (8, 4), (4, 18), 0.5)
    (x,), weights, biases, lora_a, lora_b = layers.tensors(device)
    numbers = ([1.0, 1.0], 0.5, torch.tensor([SEED], device=device), 7)
    forward = (x, weights, biases, lora_a, lora_b, *numbers, "fused", triton)
    *outputs, h = torch.ops.bpo.lora_forward(*forward)
    backward = (outputs, x, h, weights, lora_a, lora_b, *numbers, needs_x, True, triton)
    for operator, arguments in ((torch.ops.bpo.lora_forward, forward), (torch.ops.bpo.lora_backward, backward)):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_errors_name_the_argument_and_the_fix(device, on_triton):
    layers = Layers((3,), 16, (8,), (4,), 0.5)
    (x,), weights, biases, lora_a, lora_b = layers.tensors(device)
    parts = [x, weights, biases, lora_a, lora_b]

    def fails(match: str, change: dict[int, object] | None = None, **options) -> None:
        given = [(change or {}).get(position, part) for position, part in enumerate(parts)]
        with pytest.raises(ValueError, match=match):
            ours(layers, *given, **options)

    fails("mode is 'fast': use one of fused, addmm", mode="fast")
    fails("dropout is 1.0: use a probability", dropout=1.0)
    fails("dropout is 0.5 but seed is None: pass an int64 tensor", seed=None)
    fails("seed has shape .* pass an int64 tensor of shape", seed=torch.zeros(1, device=device))
    fails("stream is -1: number the layers", stream=-1)
    fails(r"weights\[0\] requires a gradient: .* freeze it", {1: [weights[0].clone().requires_grad_()]})
    fails(r"lora_a\[0\] is torch.float16 .* cast one of them", {3: [lora_a[0].half()]})
    fails(r"lora_a\[0\] has rank 257: use 1 to 256", {3: [torch.zeros(257, 16, device=device)]})
    fails(r"member 0 has .* expected \[O, 16\]", {4: [lora_b[0].t()]})
    fails("pass the same number of each, 1 to 3", {2: []})
    if on_triton:
        odd = {0: x[:, :3], 1: [weights[0][:, :3]], 3: [lora_a[0][:, :3]]}
        fails("a row of x_TD has 12 bytes: .* use mode='addmm'", odd)
        fails("set BPO_KERNELS=plain for fp64", {0: x.double()})


@pytest.mark.parametrize("ranks", [[3], [8, 33], [64, 64, 64], [200, 5]])
def test_slots_are_whole_tiles(ranks):
    slots, width = lora_operator.rank_slots(ranks, triton=True), lora_operator.slot_width(ranks, triton=True)
    assert 16 <= width <= 64 and slots[0].start == 0
    for slot, following, rank in zip(slots, [*slots[1:], slice(slots[-1].stop, 0)], ranks, strict=True):
        assert slot.stop == following.start and (slot.stop - slot.start) % width == 0
        assert rank <= slot.stop - slot.start < rank + width
