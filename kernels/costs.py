"""Bytes and launches of operators whose Triton implementation a counter on a CPU cannot see.

Legend: T rows, D features of the input, O of an output, r rank, R slots of all ranks.

A launch reads each operand once and writes each output once; what stays in the L2 between launches is not deducted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .lora_operator import rank_slots

# Multiprocessors of an H100, and a tile of A's gradient in half precision: the number of partial sums follows.
_MULTIPROCESSORS = 132
_GRAD_A_FEATURES = 4 * 32
_GRAD_A_ROWS = 64


@dataclass(frozen=True)
class LoraGroup:
    """Layers of one input: its features, the sizes of the outputs, the ranks and how many of them have a bias."""

    features: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    biases: tuple[bool, ...] = ()

    @property
    def num_slots(self) -> int:
        return rank_slots(self.ranks, triton=True)[-1].stop

    @property
    def stacked_a(self) -> tuple[int, int]:
        """Elements and launches of the copy that puts all members' A below each other."""
        slots = rank_slots(self.ranks, triton=True)
        padded = [slot.stop - slot.start != rank for slot, rank in zip(slots, self.ranks, strict=True)]
        if len(self.ranks) == 1 and not any(padded):
            return 0, 0
        return self.features * (sum(self.ranks) + self.num_slots), 1 + sum(padded)

    def base(self, tokens: int) -> list[int]:
        """Elements that each member's own GEMM moves."""
        biases = self.biases or (False,) * len(self.outputs)
        return [
            tokens * (self.features + output) + output * (self.features + bias)
            for output, bias in zip(self.outputs, biases, strict=True)
        ]


def lora_forward_cost(group: LoraGroup, tokens: int, mode: str, dropout: float, one_scale: bool) -> tuple[int, int]:
    """Elements and launches of `lora.forward`."""
    slots = group.num_slots
    passes = 1 if dropout or one_scale else len(group.outputs)
    stacked, launches = group.stacked_a
    elements = stacked + passes * tokens * group.features + slots * (group.features + tokens)
    adapters = sum(r * (tokens + output) for r, output in zip(group.ranks, group.outputs, strict=True))
    base, members = sum(group.base(tokens)), len(group.outputs)
    if mode == "fused":
        shared = tokens * group.features * (members - 1)
        return elements + base - shared + adapters, launches + passes + 1
    return elements + base + adapters + 2 * tokens * sum(group.outputs), launches + passes + 2 * members


def lora_backward_cost(
    group: LoraGroup, tokens: int, dropout: float, needs_x: bool, needs_adapter: bool, itemsize: int
) -> tuple[int, int]:
    """Bytes and launches of `lora.backward`."""
    features, slots, members = group.features, group.num_slots, len(group.outputs)
    sizes = list(zip(group.ranks, group.outputs, strict=True))
    # Zeros, then each member's part.
    elements = tokens * slots + sum(output * (tokens + r) + tokens * r for r, output in sizes)
    launches, extra_bytes = 1 + members, 0
    if needs_x:
        stacked, copies = group.stacked_a
        elements += (
            sum(output * (tokens + features) for output in group.outputs) + (2 * members - 1) * tokens * features
        )
        elements += stacked + 2 * tokens * features + slots * (tokens + features)
        launches += members + copies + 1
    if needs_adapter:
        columns = -(-features // _GRAD_A_FEATURES)
        elements += tokens * (features + slots)
        elements += sum(output * (tokens + r) + tokens * r for r, output in sizes) + sum(group.ranks) * features
        if dropout:
            parts = min(-(-_MULTIPROCESSORS // columns), -(-tokens // _GRAD_A_ROWS))
            extra_bytes = 4 * features * (slots * (2 * parts + 1) + sum(group.ranks))
        else:
            elements += slots * features + sum(group.ranks) * features
        launches += 1 + bool(dropout) + 2 * members
    return elements * itemsize + extra_bytes, launches


def lora_layer_bytes(tokens: int, groups: Sequence[LoraGroup], mode: str, *, dropout: float = 0.05) -> int:
    """Bytes in bf16 that the forward of a decoder layer's linear layers moves.

    Args:
        groups: layers that have the same input: q, k and v; o; gate and up; down.
        mode: `base` for the frozen layers alone, `fused`, `addmm`, or `peft` for PEFT's sequence of operators.
    """
    if mode == "base":
        return 2 * sum(sum(group.base(tokens)) for group in groups)
    if mode == "peft":
        return 2 * sum(_peft_elements(group, tokens, dropout) for group in groups)
    return 2 * sum(lora_forward_cost(group, tokens, mode, dropout, one_scale=True)[0] for group in groups)


def _peft_elements(group: LoraGroup, tokens: int, dropout: float) -> int:
    """Of each layer: its GEMM, dropout with its mask of bytes, A, B, the scale, the sum."""
    elements = sum(group.base(tokens))
    for r, output in zip(group.ranks, group.outputs, strict=True):
        if dropout:
            elements += 2 * tokens * group.features + tokens * group.features // 2
        elements += tokens * (group.features + r) + group.features * r
        elements += tokens * (r + output) + output * r + 2 * tokens * output + 3 * tokens * output
    return elements


def rest_of_layer_bytes(tokens: int, groups: Sequence[LoraGroup]) -> int:
    """Bytes in bf16 that a decoder layer moves outside its linear layers, if each step is one kernel.

    Two norms, rotary embedding, attention, two additions to the residual stream, gate times up.
    """
    attention, _, mlp, _ = groups
    (query, key, value), hidden, gate = attention.outputs, attention.features, mlp.outputs[0]
    rotated, attended = 2 * (query + key), 2 * query + key + value
    return 2 * tokens * (4 * hidden + rotated + attended + 6 * hidden + 3 * gate)


def decoder_layer(hidden: int, key: int, gate: int, rank: int, *, biased: bool = False) -> list[LoraGroup]:
    """The groups of a decoder layer of LLaMA's and Qwen2's kind; `key`: width of k and of v."""
    return [
        LoraGroup(hidden, (hidden, key, key), (rank,) * 3, (biased,) * 3),
        LoraGroup(hidden, (hidden,), (rank,)),
        LoraGroup(hidden, (gate, gate), (rank,) * 2),
        LoraGroup(gate, (hidden,), (rank,)),
    ]


def _group_of(weights: Sequence[Tensor], lora_a: Sequence[Tensor], biases: Sequence[Any]) -> LoraGroup:
    outputs = tuple(weight.shape[0] for weight in weights)
    ranks = tuple(a.shape[0] for a in lora_a)
    return LoraGroup(weights[0].shape[1], outputs, ranks, tuple(bias is not None for bias in biases))


def _forward(x: Tensor, weights: Any, biases: Any, lora_a: Any, *rest: Any) -> tuple[int, int]:
    _, scales, dropout, _, _, mode, _ = rest
    group, tokens = _group_of(weights, lora_a, biases), x.numel() // x.shape[-1]
    elements, launches = lora_forward_cost(group, tokens, mode, dropout, len(set(scales)) == 1)
    return elements * x.itemsize, launches


def _backward(grads: Any, x: Tensor, h: Tensor, weights: Any, lora_a: Any, *rest: Any) -> tuple[int, int]:
    _, _, dropout, _, _, needs_x, needs_adapter, _ = rest
    group, tokens = _group_of(weights, lora_a, [None] * len(weights)), x.numel() // x.shape[-1]
    return lora_backward_cost(group, tokens, dropout, needs_x, needs_adapter, x.itemsize)


# By the operator's name: a function of its arguments that gives bytes and launches of the Triton implementation.
OP_COSTS: dict[str, Callable[..., tuple[int, int]]] = {
    "bpo::lora_forward": _forward,
    "bpo::lora_backward": _backward,
}
