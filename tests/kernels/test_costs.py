"""Bytes and launches of `lora_linear` by formula: sums by hand, and whole decoder layers."""

from __future__ import annotations

import pytest
import torch

from bpo_kernels.costs import (
    OP_COSTS,
    LoraGroup,
    decoder_layer,
    lora_backward_cost,
    lora_forward_cost,
    lora_layer_bytes,
    rest_of_layer_bytes,
)

TOKENS, RANK = 8192, 32
LAYERS = {
    "llava-1.5-7b": decoder_layer(4096, 4096, 11008, RANK),
    "qwen2.5-vl-7b": decoder_layer(3584, 512, 18944, RANK, biased=True),
}


@pytest.mark.parametrize(("name", "linear_limit"), [("llava-1.5-7b", 1.15), ("qwen2.5-vl-7b", 1.17)])
def test_what_a_decoder_layer_moves(name, linear_limit):
    """With adapters against frozen, of the linear layers and of the whole layer. Qwen's linear layers miss 1.15: its
    MLP is five times as wide as its input, and the down projection reads that twice."""
    groups = LAYERS[name]
    base, rest = lora_layer_bytes(TOKENS, groups, "base"), rest_of_layer_bytes(TOKENS, groups)
    linear = {mode: lora_layer_bytes(TOKENS, groups, mode) / base for mode in ("fused", "addmm", "peft")}
    whole = {mode: (factor * base + rest) / (base + rest) for mode, factor in linear.items()}
    assert linear["fused"] <= linear_limit and whole["fused"] <= 1.10
    assert 2.0 < linear["addmm"] < 2.1 and 1.5 < whole["addmm"] < 1.6
    assert 4.6 < linear["peft"] < 4.8 and 2.8 < whole["peft"] < 3.0


def test_the_forward_of_a_small_group_by_hand():
    group = LoraGroup(64, (32, 16), (16, 8), (True, False))
    # A twice read and once written, or padded from 24 to 32 rows; x, A and h; then the products.
    stacked = 64 * 24 + 64 * 32
    down = 10 * 64 + 32 * 64 + 10 * 32
    products = 32 * 64 + 16 * 64 + 32 + 10 * (32 + 16)
    adapters = 10 * (16 + 8) + 32 * 16 + 16 * 8
    fused = stacked + down + products + 10 * 64 + adapters
    assert lora_forward_cost(group, 10, "fused", 0.1, True) == (fused, 4)  # zeros, A, h, the GEMM
    assert lora_forward_cost(group, 10, "fused", 0.1, False) == (fused, 4)  # the kernel scales each slot
    addmm = fused + 10 * 64 + 2 * 10 * (32 + 16)
    assert lora_forward_cost(group, 10, "addmm", 0.1, True) == (addmm, 7)
    assert lora_forward_cost(group, 10, "fused", 0.0, False) == (fused + 10 * 64, 5)


def test_the_backward_of_one_layer_by_hand():
    group = LoraGroup(64, (32,), (16,))
    grad_h = 2 * 130 * 16 + 130 * 32 + 32 * 16
    grad_x = 130 * 32 + 32 * 64 + 130 * 64 + 2 * 130 * 64 + 16 * (130 + 64)
    grad_b = 130 * (32 + 16) + 32 * 16
    # Three parts of 64 rows: written and read in fp32, their total written and read.
    grad_a = 130 * (64 + 16) + 16 * 64
    partial_bytes = 4 * 64 * 16 * (2 * 3 + 1 + 1)
    elements = grad_h + grad_x + grad_a + grad_b
    assert lora_backward_cost(group, 130, 0.1, True, True, 2) == (2 * elements + partial_bytes, 8)
    assert lora_backward_cost(group, 130, 0.1, True, False, 2) == (2 * (grad_h + grad_x), 4)


def test_costs_by_the_operators_arguments():
    x, seed = torch.zeros(2, 5, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    weights, lora_a, lora_b = [torch.zeros(32, 64)], [torch.zeros(16, 64)], [torch.zeros(32, 16)]
    numbers = ([2.0], 0.1, seed, 0)
    group = LoraGroup(64, (32,), (16,), (False,))
    elements, launches = lora_forward_cost(group, 10, "addmm", 0.1, True)
    forward = (x, weights, [None], lora_a, lora_b, *numbers, "addmm", False)
    assert OP_COSTS["bpo::lora_forward"](*forward) == (2 * elements, launches)
    h = torch.zeros(10, 16)
    backward = ([torch.zeros(2, 5, 32)], x, h, weights, lora_a, lora_b, *numbers, True, True, False)
    assert OP_COSTS["bpo::lora_backward"](*backward) == lora_backward_cost(group, 10, 0.1, True, True, 2)
