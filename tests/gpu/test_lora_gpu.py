"""`lora_linear` on a real GPU, with the layers of LLaVA-1.5-7B.

Legend: T rows, D features of the input, O of an output, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bpo_kernels.dispatch import lora_linear
from bpo_kernels.philox import keep_mask

pytestmark = pytest.mark.gpu  # skipped by tests/conftest.py without CUDA

ROWS, FEATURES, RANK, DROPOUT, SCALE = 2048, 4096, 32, 0.05, 2.0
# Outputs of each layer, and whether they have biases: keys and values of fewer heads; gate and up.
GROUPS = {"q k v": ((4096, 512, 512), True), "gate up": ((11008, 11008), False)}


@pytest.fixture(autouse=True)
def never_waits_for_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.set_sync_debug_mode("default")


def _layers(outputs: tuple[int, ...], biased: bool) -> tuple[Tensor, list, list, list, list]:
    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device="cuda") / columns**0.5).bfloat16()

    x = torch.randn(ROWS, FEATURES, device="cuda").bfloat16()
    biases = [torch.randn(output, device="cuda").bfloat16() if biased else None for output in outputs]
    lora_a = [matrix(RANK, FEATURES) for _ in outputs]
    return x, [matrix(output, FEATURES) for output in outputs], biases, lora_a, [matrix(o, RANK) for o in outputs]


def _run(operation, dtype: torch.dtype, layers, grads: list[Tensor]) -> list[Tensor]:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    x, *rest = layers
    weights, biases, lora_a, lora_b = [[cast(one) for one in part] for part in rest]
    trained = [one.detach().requires_grad_() for one in (cast(x), *lora_a, *lora_b)]
    size = len(weights)
    outputs = operation(trained[0], weights, biases, trained[1 : 1 + size], trained[1 + size :])
    results = torch.autograd.grad(outputs, trained, [grad.to(dtype) for grad in grads])
    return [*(y.detach() for y in outputs), *results]


@pytest.mark.parametrize("group", GROUPS)
def test_both_modes_are_as_exact_as_peft_and_never_wait_for_the_device(group):
    outputs, biased = GROUPS[group]
    layers = _layers(outputs, biased)
    grads = [torch.randn(ROWS, output, device="cuda").bfloat16() for output in outputs]
    seed = torch.tensor([123456789012345], device="cuda")
    mask = keep_mask(ROWS, FEATURES, DROPOUT, seed, 5)

    def eager(x, weights, biases, lora_a, lora_b) -> list[Tensor]:
        dropped = x * mask / (1 - DROPOUT)
        members = zip(weights, biases, lora_a, lora_b, strict=True)
        return [torch.nn.functional.linear(x, w, c) + dropped @ a.t() @ b.t() * SCALE for w, c, a, b in members]

    truth, rough = _run(eager, torch.float64, layers, grads), _run(eager, torch.bfloat16, layers, grads)
    for mode in ("fused", "addmm"):

        def ours(*arguments, mode=mode) -> tuple[Tensor, ...]:
            options = {"dropout": DROPOUT, "seed": seed, "stream": 5, "mode": mode}
            return lora_linear(*arguments, [SCALE] * len(outputs), **options)

        first = _run(ours, torch.bfloat16, layers, grads)
        torch.cuda.set_sync_debug_mode("error")
        again = _run(ours, torch.bfloat16, layers, grads)
        torch.cuda.set_sync_debug_mode("default")
        for position, (true, naive, value, same) in enumerate(zip(truth, rough, first, again, strict=True)):
            assert torch.equal(value, same), f"{mode}, result {position}: other bits in the second run"
            allowed = 1.1 * float((naive - true).abs().max()) + 2e-3 * float(true.abs().max())
            error = float((value - true).abs().max())
            assert error <= allowed, f"{mode}, result {position}: error {error} > {allowed}"
            total, allowed = float((value - true).norm()), 1.1 * float((naive - true).norm())
            assert total <= allowed, f"{mode}, result {position}: norm of the error {total} > {allowed}"


def test_the_mask_of_a_group_of_many_tiles_is_that_of_plain_pytorch():
    eye = torch.eye(256, device="cuda", dtype=torch.bfloat16)
    x, seed = torch.ones(ROWS, 256, device="cuda", dtype=torch.bfloat16), torch.tensor([987654321], device="cuda")
    x.requires_grad_()
    (y,) = lora_linear(x, [0 * eye], [None], [eye], [eye], [1.0], dropout=0.25, seed=seed, stream=9, mode="addmm")
    mask = keep_mask(ROWS, 256, 0.25, seed, 9)
    assert torch.equal(y != 0, mask)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, mask)
