"""FLOP formulas of attention for `torch.utils.flop_counter.FlopCounterMode`, which covers few attention operators.

The convention is PyTorch's: a causal mask is not subtracted, so each query of a sequence is counted with each of its
keys. The forward pass has two products, the backward pass five, since it recomputes the scores. A packed row consists
of the sequences of `causal_sequences`: `flash`, `varlen` and `flex` have the same count. `sdpa` counts its two calls
per group, which also compute each completion against its siblings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from bpo.model.attention.rows import causal_sequences
from bpo.records import PackedLayout


class _Signature(NamedTuple):
    """Argument names of a family of operators, and the token dimension of a dense batch."""

    query: str
    key: str
    value: str
    starts_q: str
    starts_k: str
    tokens_dim: int


_FLASH_ATTN = _Signature("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", -3)
_TORCH_VARLEN = _Signature("query", "key", "value", "cu_seq_q", "cu_seq_k", -3)
_SDPA = _Signature("query", "key", "value", "", "", -2)

# Forward operator, backward operator, their arguments. A library's operators exist only after its import.
_LIBRARIES = (
    ("flash_attn::_flash_attn_varlen_forward", "flash_attn::_flash_attn_varlen_backward", _FLASH_ATTN),
    ("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_backward", _FLASH_ATTN),  # towers
    ("flash_attn_3::_flash_attn_forward", "flash_attn_3::_flash_attn_backward", _FLASH_ATTN),
    ("flash_attn_3::fwd", "flash_attn_3::bwd", _FLASH_ATTN),  # earlier versions have only these
    ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward", _TORCH_VARLEN),
)
_SDPA_KERNELS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


def sequence_pairs(layout: PackedLayout) -> int:
    """Query-key pairs of all sequences of a packed row."""
    return sum(sequence.num_queries * sequence.num_keys for sequence in causal_sequences(layout))


def forward_flops(pairs: int, size: int, value_size: int) -> int:
    """FLOPs of query x key and probability x value, for `pairs` summed over heads."""
    return 2 * pairs * (size + value_size)


def backward_flops(pairs: int, size: int, value_size: int) -> int:
    """FLOPs of recomputing the scores and of the gradients of probabilities, values, queries and keys."""
    return 2 * pairs * (3 * size + 2 * value_size)


def register_flop_formulas() -> None:
    """Registers formulas of loaded attention operators that PyTorch lacks, for every later `FlopCounterMode`.

    PyTorch 2.11 also fails to count SDPA with fewer key heads than query heads; those formulas are replaced.
    """
    for forward, backward, signature in _LIBRARIES:
        _register(forward, signature, forward_flops)
        _register(backward, signature, backward_flops)
    if not _sdpa_counts_grouped_heads():
        for name in _SDPA_KERNELS:
            _register(name, _SDPA, forward_flops, replace=True)
            _register(f"{name}_backward", _SDPA, backward_flops, replace=True)


def _sdpa_counts_grouped_heads() -> bool:
    try:
        return sdpa_flop_count((1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)) > 0
    except AssertionError:
        return False


def _register(name: str, signature: _Signature, flops: Callable[[int, int, int], int], replace: bool = False) -> None:
    namespace, operator = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if packet is None or (packet in flop_registry and not replace):
        return
    names = [argument.name for argument in packet.default._schema.arguments]

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = given[signature.query], given[signature.key], given[signature.value]
        pairs = _pairs(query, key, given.get(signature.starts_q), given.get(signature.starts_k), signature.tokens_dim)
        return flops(pairs, query.shape[-1], value.shape[-1])

    flop_registry.pop(packet, None)
    register_flop_formula(packet, get_raw=True)(formula)


def _pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    tokens_dim: int,
) -> int:
    """Query-key pairs of all heads and sequences, counted per query head."""
    if starts_q is not None and starts_k is not None:
        return query.shape[-2] * int((starts_q.diff().long() * starts_k.diff().long()).sum())
    return query.shape[:-1].numel() * key.shape[tokens_dim]


# FlexAttention runs as compiled code, which is invisible to a counter. This no-op's formula returns its argument; it is
# called once per forward pass and once per backward pass.
torch.library.define("bpo::flex_attention_flops", "(int flops) -> ()")


@torch.library.impl("bpo::flex_attention_flops", "CompositeExplicitAutograd")
def _no_work(flops: int) -> None:
    pass


@register_flop_formula(torch.ops.bpo.flex_attention_flops, get_raw=True)
def _stated_flops(flops: int, out_val: Any = None) -> int:
    return flops


class _CountBackward(torch.autograd.Function):
    """The identity, whose backward pass reports FLOPs."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, flops: int) -> torch.Tensor:
        ctx.flops = flops
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        torch.ops.bpo.flex_attention_flops(ctx.flops)
        return gradient, None


def count_compiled(output_BHTD: torch.Tensor, pairs: int, size: int, value_size: int) -> torch.Tensor:
    """Reports the FLOPs of the compiled attention that returned `output_BHTD`, with `pairs` per head, and its gradient.

    A no-op without a dispatch mode, as there is no counter.
    """
    if _get_current_dispatch_mode() is None:
        return output_BHTD
    pairs *= output_BHTD.shape[1]
    torch.ops.bpo.flex_attention_flops(forward_flops(pairs, size, value_size))
    return _CountBackward.apply(output_BHTD, backward_flops(pairs, size, value_size))
