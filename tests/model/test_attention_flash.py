"""flash-attn over packed rows, on the plain function of its contract.

    python -m pytest tests/model/test_attention_flash.py

Shape letters: T packed tokens, K key heads, D head size, R gathered rows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from bpo.model import attention_flash
from bpo.model.attention_flash import _GatherRows, flash_attend, flash_plan
from bpo.records import PackedLayout
from tests.attention_backends import LAYOUTS, layout_of, num_tokens, random_qkv, run_without_gpu
from tests.varlen_reference import flash_attn_varlen_func

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_plain_function_keeps_the_contract(causal: bool, key_heads: int) -> None:
    """Sequences of as many queries as keys, and of fewer: the mask is then aligned bottom-right."""
    lengths = [(5, 5), (2, 7), (1, 9), (1, 1), (4, 6)]
    queries, keys = (sum(pair[i] for pair in lengths) for i in (0, 1))
    query, (key, value) = random_qkv(queries)[0], random_qkv(keys, key_heads=key_heads)[1:]
    offsets = [torch.tensor([0, *torch.tensor(lengths)[:, i].cumsum(0).tolist()], dtype=torch.int32) for i in (0, 1)]
    output = flash_attn_varlen_func(
        *(one[0].transpose(0, 1) for one in (query, key, value)), *offsets, 5, 9, softmax_scale=0.3, causal=causal
    )
    pieces, q, k = [], 0, 0
    for n, m in lengths:
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, q : q + n],
                key[:, :, k : k + m].repeat_interleave(4 // key_heads, 1),
                value[:, :, k : k + m].repeat_interleave(4 // key_heads, 1),
                attn_mask=causal_lower_right(n, m) if causal else None,
                scale=0.3,
            )
        )
        q, k = q + n, k + m
    torch.testing.assert_close(output, torch.cat(pieces, 2)[0].transpose(0, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 4])}, "int32"),
        ({"cu_seqlens_k": torch.tensor([0, 3], dtype=torch.int32)}, "does not cover"),
        ({"max_seqlen_k": 5}, "max_seqlen_k is 5"),
        ({"dropout_p": 0.1}, "leaves out"),
    ],
)
def test_the_plain_function_refuses_what_flash_attn_would_misread(change: dict, message: str) -> None:
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    arguments = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 4, "max_seqlen_k": 4}
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, q, q, **{**arguments, **change})


def test_sequences_of_a_plan() -> None:
    """A prefix with its first completion, then each other completion with its prefix's keys again."""
    plan = flash_plan(layout_of((3, (2, 1)), (2, ()), (1, (1,))), CPU)
    assert plan.cu_seqlens_q_S1.tolist() == [0, 5, 6, 8, 10]
    assert plan.cu_seqlens_k_S1.tolist() == [0, 5, 9, 11, 13]
    assert plan.rows_R.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (5, 5)
    assert {t.dtype for t in (plan.cu_seqlens_q_S1, plan.cu_seqlens_k_S1, plan.rows_R, plan.places_R)} == {torch.int32}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_keys_are_copied_only_where_several_sequences_read_them(layout: PackedLayout) -> None:
    plan = flash_plan(layout, CPU)
    extra = sum(
        (end - start) * max(0, len(completions) - 1)
        for (start, end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True)
    )
    assert len(plan.rows_R) == num_tokens(layout) + extra
    assert plan.repeats == (extra > 0)


def test_gradients_of_copies_are_summed() -> None:
    layout = layout_of((30, (2, 3, 4, 1)), (7, ()), (11, (5, 2)))
    plan = flash_plan(layout, CPU)
    source = random_qkv(num_tokens(layout))[0][0].transpose(0, 1)
    gathered = _GatherRows.apply(source, plan)
    assert torch.equal(gathered, source[plan.rows_R.long()])
    weight = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours,) = torch.autograd.grad((gathered * weight).sum(), source)
    expected = torch.zeros(source.shape, dtype=torch.float64).index_add_(0, plan.rows_R.long(), weight)
    torch.testing.assert_close(ours, expected, atol=1e-14, rtol=0)


def test_gradcheck_of_the_gather() -> None:
    plan = flash_plan(layout_of((3, (2, 1, 1)), (2, (1, 1))), CPU)
    source = torch.randn(11, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: _GatherRows.apply(one, plan), source)


@pytest.mark.parametrize("deterministic", [False, True])
def test_options_reach_flash_attn(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_gpu(monkeypatch)
    seen = {}

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.update(options, heads=(q.shape[1], k.shape[1], v.shape[1]), is_view=q._base is not None)
        return q

    monkeypatch.setattr(attention_flash, "varlen_function", lambda: recording)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    layout = LAYOUTS["three unequal groups"]
    qkv = random_qkv(num_tokens(layout), key_heads=2)
    flash_attend(*qkv, flash_plan(layout, CPU), scaling=0.3, dropout=0.1)
    assert seen["heads"] == (4, 2, 2) and seen["is_view"]  # key heads are not repeated, queries are not copied
    wanted = {"softmax_scale": 0.3, "dropout_p": 0.1, "causal": True, "deterministic": deterministic}
    assert {name: seen[name] for name in wanted} == wanted
