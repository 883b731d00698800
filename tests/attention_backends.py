"""Backends of packed attention that run without a GPU, and layouts to compare them on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from bpo.model.attention import flash as attention_kernels
from bpo.model.attention import flex as attention_flex
from bpo.model.attention.choice import BackendName
from bpo.records import PackedLayout
from tests.varlen_reference import flash_attn_3_varlen_func, flash_attn_varlen_func, install_operators

VARLEN: tuple[BackendName, ...] = ("flash3", "flash", "varlen")
BACKENDS: tuple[BackendName, ...] = ("sdpa", *VARLEN, "flex")


def layout_of(*groups: tuple[int, Sequence[int]]) -> PackedLayout:
    """The layout of groups given as (tokens of the prefix, tokens of each completion)."""
    prefixes, completions, end = [], [], 0
    for prefix, lengths in groups:
        prefixes.append((end, end + prefix))
        end += prefix
        spans = []
        for length in lengths:
            spans.append((end, end + length))
            end += length
        completions.append(tuple(spans))
    return PackedLayout(tuple(prefixes), tuple(completions))


LAYOUTS = {
    "three unequal groups": layout_of((5, (3, 1, 3)), (1, (2, 4)), (9, (1, 1))),
    "one completion": layout_of((3, (4,))),
    "a stand-in image at the end": layout_of((4, (2, 1)), (2, (1,)), (6, ())),
    "a stand-in image between": layout_of((4, ()), (2, (1, 3))),
    "longer than a block": layout_of((150, (40, 128, 3)), (7, (60, 1)), (20, ())),
}


def num_tokens(layout: PackedLayout) -> int:
    return max(end for spans in (layout.prefix_spans, *layout.completion_spans) for _, end in spans)


def random_qkv(
    length: int,
    heads: int = 4,
    key_heads: int = 4,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    head_size: int = 8,
) -> list[torch.Tensor]:
    """Queries, keys and values [1, heads, length, head size], laid out in memory as projections leave them."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, length, count, head_size, generator=generator, dtype=torch.float64)
        for count in (heads, key_heads, key_heads)
    ]
    return [tensor.to(device, dtype).transpose(1, 2).requires_grad_() for tensor in made]


def each_sequence_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: float | None = None
) -> torch.Tensor:
    """[B, T, H, D] from one causal attention per completion on [prefix | completion]."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    output = torch.zeros_like(query)
    for prefix, completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        for span in completions or [(prefix[1], prefix[1])]:
            rows = [*range(*prefix), *range(*span)]
            alone = F.scaled_dot_product_attention(
                query[:, :, rows], key[:, :, rows], value[:, :, rows], is_causal=True, scale=scale
            )
            output[:, :, rows] = alone
    return output.transpose(1, 2)


def num_compilations() -> int:
    """How many times the compiler has translated FlexAttention for different inputs since its last reset."""
    return len(_debug_get_cache_entry_list(flex_attention.flex_attention.__code__))


def _closed(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph in eager PyTorch. Like compiled code it is closed to dispatch modes, in the backward pass too."""

    def run(arguments: list[Any]) -> Any:
        with _disable_current_modes():
            return graph(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@functools.cache
def _traced_flex_attention() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention.flex_attention, dynamic=True, backend=aot_autograd(fw_compiler=_closed))


def _any_device(*tensors: torch.Tensor) -> None:
    """Replaces FlexAttention's check that rejects gradients on the CPU."""


def run_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every backend run on the CPU.

    flash-attn's functions and the kernel under PyTorch's `varlen_attn` are replaced (tests/varlen_reference.py).
    FlexAttention is traced by the compiler as on a GPU, but its graph runs in eager PyTorch, whose backward pass works
    on the CPU once its device check is out of the way.
    """
    install_operators()
    attention_kernels.torch_varlen_attn()  # imported before it is used, as `choose_backend` does
    monkeypatch.setattr(attention_kernels, "flash_attn_2", lambda: flash_attn_varlen_func)
    monkeypatch.setattr(attention_kernels, "flash_attn_3", lambda: flash_attn_3_varlen_func)
    monkeypatch.setattr(flex_attention, "_validate_device", _any_device)
    monkeypatch.setattr(attention_flex, "compiled_flex_attention", _traced_flex_attention)
