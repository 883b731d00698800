"""Attention over packed groups against each sequence alone. Run: python -m pytest tests/model/test_attention.py

Shape letters: B batch, H heads, T packed tokens, D head size.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bpo.model import attention
from bpo.model.attention import packed_layout, register, shared_prefix_attention
from bpo.records import PackedLayout

LAYOUTS = {
    "two groups": PackedLayout(((0, 5), (12, 13)), (((5, 8), (8, 9), (9, 12)), ((13, 15), (15, 19)))),
    "one completion": PackedLayout(((0, 3),), (((3, 7),),)),
    "prefix only": PackedLayout(((0, 4), (4, 6)), ((), ((6, 7),))),
}


def random_qkv(
    length: int, heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, length, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def each_sequence_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: Any):
    """[B, H, T, D] from one causal attention a completion on [prefix | completion]."""
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
    return output


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("kv_heads", "scale"), [(4, None), (2, 0.3)], ids=["plain", "grouped-query"])
def test_equals_each_sequence_alone(layout: PackedLayout, kv_heads: int, scale: float | None) -> None:
    length = max(end for spans in (layout.prefix_spans, *layout.completion_spans) for _, end in spans)
    query, key, value = random_qkv(length, kv_heads=kv_heads)
    output = shared_prefix_attention(query, key, value, layout, scale)
    expected = each_sequence_alone(query, key, value, layout, scale)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


def test_gradients_equal_those_of_dense_masked_attention() -> None:
    layout = LAYOUTS["two groups"]
    allowed = torch.zeros(19, 19, dtype=torch.bool)
    for prefix, completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        for span in (prefix, *completions):
            for row in range(*span):
                allowed[row, [*range(prefix[0], min(prefix[1], row + 1)), *range(span[0], row + 1)]] = True
    packed, dense = random_qkv(19), random_qkv(19)
    weight = torch.randn(1, 4, 19, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (shared_prefix_attention(*packed, layout) * weight).sum().backward()
    (F.scaled_dot_product_attention(*dense, attn_mask=allowed) * weight).sum().backward()
    for ours, theirs in zip(packed, dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


def test_keeps_the_dtype_of_the_query() -> None:
    output = shared_prefix_attention(*random_qkv(7, dtype=torch.bfloat16), LAYOUTS["one completion"])
    assert output.dtype == torch.bfloat16 and output.shape == (1, 4, 7, 8)


def test_layouts_nest_and_are_gone_after_an_error() -> None:
    query, key, value = random_qkv(7)
    outer = LAYOUTS["one completion"]
    module = torch.nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]

    def output() -> torch.Tensor:
        return attention._attention_interface(module, query, key, value, None)[0].transpose(1, 2)

    with packed_layout(outer):
        with pytest.raises(RuntimeError, match="inner"), packed_layout(LAYOUTS["prefix only"]):
            raise RuntimeError("inner")
        assert torch.equal(output(), shared_prefix_attention(query, key, value, outer))
    assert not attention._layouts


def test_masks_go_with_their_batch() -> None:
    """A run has a new layout in every batch: masks that stayed would fill the memory."""
    with packed_layout(LAYOUTS["two groups"]):
        shared_prefix_attention(*random_qkv(19), LAYOUTS["two groups"])
        mask = weakref.ref(attention._suffix_mask(5, (3, 1, 3), torch.device("cpu")))
        assert attention._suffix_mask.cache_info().hits == 1  # one mask for all layers
    gc.collect()
    assert mask() is None


def test_sliding_windows_are_refused() -> None:
    with packed_layout(LAYOUTS["one completion"]), pytest.raises(ValueError, match="sliding-window"):
        attention._attention_interface(torch.nn.Module(), *random_qkv(7), None, sliding_window=4)


def test_registering_twice_gives_the_same_name() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert register() == register() == attention.NAME
    assert attention.NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
