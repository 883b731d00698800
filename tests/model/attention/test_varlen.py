"""Variable-length attention over packed rows: plans, gathered keys, and three functions with one interface.

Shape letters: T packed tokens, K key heads, D head size, R gathered rows, S sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from bpo.model.attention import flash as attention_kernels
from bpo.model.attention.flash import Kernel, attend_flash_2, attend_flash_3, attend_torch_varlen
from bpo.model.attention.varlen import VarlenPlan, _GatherRows, varlen_attend, varlen_plan
from bpo.records import PackedLayout
from tests.attention_backends import LAYOUTS, layout_of, num_tokens, random_qkv, run_without_gpu

CPU = torch.device("cpu")
KERNELS = {"flash-attn 2": attend_flash_2, "flash-attn 3": attend_flash_3, "torch": attend_torch_varlen}
# Queries and keys of sequences: equal numbers, and fewer queries with a mask aligned bottom-right.
LENGTHS = [(5, 5), (2, 7), (1, 9), (1, 1), (4, 6)]


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_gpu(monkeypatch)


def plan_of(lengths: list[tuple[int, int]], **changes: Any) -> VarlenPlan:
    """The fields of a plan that a kernel reads."""
    starts = [
        torch.tensor([0, *torch.tensor(lengths)[:, side].cumsum(0).tolist()], dtype=torch.int32) for side in (0, 1)
    ]
    fields: dict[str, Any] = {
        "cu_seqlens_q_S1": starts[0],
        "cu_seqlens_k_S1": starts[1],
        "max_seqlen_q": max(queries for queries, _ in lengths),
        "max_seqlen_k": max(keys for _, keys in lengths),
    }
    empty = torch.empty(0, dtype=torch.int32)
    return VarlenPlan(**{**fields, **changes}, rows_R=empty, places_R=empty, place_starts_T=empty)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_kernels_keep_the_contract(kernel: Kernel, key_heads: int, scale: float | None) -> None:
    """Values and gradients of each sequence, against SDPA with a mask aligned bottom-right."""
    num_queries, num_keys = (sum(pair[side] for pair in LENGTHS) for side in (0, 1))
    query, (key, value) = random_qkv(num_queries)[0], random_qkv(num_keys, key_heads=key_heads)[1:]
    inputs = (query, key, value)
    output = kernel(*(x[0].transpose(0, 1) for x in inputs), plan_of(LENGTHS), scale, 0.0)
    pieces, q, k = [], 0, 0
    for n, m in LENGTHS:
        keys, values = (x[:, :, k : k + m].repeat_interleave(4 // key_heads, 1) for x in (key, value))
        mask = causal_lower_right(n, m)
        pieces.append(F.scaled_dot_product_attention(query[:, :, q : q + n], keys, values, attn_mask=mask, scale=scale))
        q, k = q + n, k + m
    expected = torch.cat(pieces, 2)[0].transpose(0, 1)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (output, expected))
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q_S1": torch.tensor([0, 4])}, "int32"),
        ({"cu_seqlens_k_S1": torch.tensor([0, 3], dtype=torch.int32)}, "does not cover"),
        ({"max_seqlen_k": 5}, "max_seqlen_k is 5"),
    ],
)
def test_stand_ins_refuse_what_the_kernels_would_misread(kernel: Kernel, change: dict, message: str) -> None:
    rows = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=message):
        kernel(rows, rows, rows, plan_of([(4, 4)], **change), None, 0.0)


def test_flash_attn_3_of_an_early_version_returns_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(4, 2, 8)
    monkeypatch.setattr(attention_kernels, "flash_attn_3", lambda: lambda q, k, v, **options: (q, "log-sum-exps"))
    assert attend_flash_3(rows, rows, rows, plan_of([(4, 4)]), None, 0.0) is rows


@pytest.mark.parametrize("takes_switch", [False, True])
def test_grouped_heads_are_allowed_where_varlen_attn_asks(takes_switch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11's function has no `enable_gqa` and takes grouped heads directly; 2.13's requires it for them."""
    from torch.nn.attention import varlen

    def with_switch(query: torch.Tensor, *rest: Any, enable_gqa: bool = False, **options: Any) -> bool:
        return enable_gqa

    def without(query: torch.Tensor, *rest: Any, scale: Any = None, window_size: Any = (-1, -1)) -> bool:
        return False

    monkeypatch.setattr(varlen, "varlen_attn", with_switch if takes_switch else without)
    rows = torch.zeros(4, 2, 8)
    attention_kernels.torch_varlen_attn.cache_clear()
    try:
        assert attend_torch_varlen(rows, rows, rows, plan_of([(4, 4)]), None, 0.0) is takes_switch
    finally:
        attention_kernels.torch_varlen_attn.cache_clear()


def test_sequences_of_a_plan() -> None:
    """A prefix with its first completion, then each other completion with its prefix's keys again."""
    plan = varlen_plan(layout_of((3, (2, 1)), (2, ()), (1, (1,))), CPU)
    assert plan.cu_seqlens_q_S1.tolist() == [0, 5, 6, 8, 10]
    assert plan.cu_seqlens_k_S1.tolist() == [0, 5, 9, 11, 13]
    assert plan.rows_R.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (5, 5)
    assert {t.dtype for t in (plan.cu_seqlens_q_S1, plan.cu_seqlens_k_S1, plan.rows_R, plan.places_R)} == {torch.int32}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_keys_are_copied_only_where_several_sequences_read_them(layout: PackedLayout) -> None:
    plan = varlen_plan(layout, CPU)
    extra = sum(
        (end - start) * max(0, len(completions) - 1)
        for (start, end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True)
    )
    assert len(plan.rows_R) == num_tokens(layout) + extra
    assert plan.repeats == (extra > 0)


def test_gradients_of_copies_are_summed() -> None:
    layout = layout_of((30, (2, 3, 4, 1)), (7, ()), (11, (5, 2)))
    plan = varlen_plan(layout, CPU)
    source = random_qkv(num_tokens(layout))[0][0].transpose(0, 1)
    gathered = _GatherRows.apply(source, plan)
    assert torch.equal(gathered, source[plan.rows_R.long()])
    weight = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours,) = torch.autograd.grad((gathered * weight).sum(), source)
    expected = torch.zeros(source.shape, dtype=torch.float64).index_add_(0, plan.rows_R.long(), weight)
    torch.testing.assert_close(ours, expected, atol=1e-14, rtol=0)


def test_gradcheck_of_the_gather() -> None:
    plan = varlen_plan(layout_of((3, (2, 1, 1)), (2, (1, 1))), CPU)
    source = torch.randn(11, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: _GatherRows.apply(one, plan), source)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("kernel", "look_up", "own_options"),
    [
        (attend_flash_2, "flash_attn_2", {"softmax_scale": 0.3, "dropout_p": 0.0, "causal": True}),
        (attend_flash_3, "flash_attn_3", {"softmax_scale": 0.3, "causal": True}),
        (attend_torch_varlen, "torch_varlen_attn", {"scale": 0.3, "window_size": (-1, 0)}),
    ],
    ids=KERNELS,
)
def test_options_reach_the_library(
    kernel: Kernel, look_up: str, own_options: dict, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernel reads the deterministic setting itself."""
    seen: dict[str, Any] = {}

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *offsets: object, **options: object) -> Any:
        seen.update(options, heads=(q.shape[1], k.shape[1], v.shape[1]), is_view=q._base is not None)
        return q

    monkeypatch.setattr(attention_kernels, look_up, lambda: recording)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    layout = LAYOUTS["three unequal groups"]
    qkv = random_qkv(num_tokens(layout), key_heads=2)
    varlen_attend(*qkv, varlen_plan(layout, CPU), scaling=0.3, kernel=kernel)
    assert seen["heads"] == (4, 2, 2) and seen["is_view"]  # key heads are not repeated, queries are not copied
    wanted = own_options if kernel is attend_torch_varlen else {**own_options, "deterministic": deterministic}
    assert {name: seen[name] for name in wanted} == wanted


def test_dropout_reaches_flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(attention_kernels, "flash_attn_2", lambda: lambda q, k, v, **options: seen.update(options) or q)
    layout = LAYOUTS["one completion"]
    plan = varlen_plan(layout, CPU)
    varlen_attend(*random_qkv(num_tokens(layout)), plan, dropout=0.1, kernel=attend_flash_2)
    assert seen["dropout_p"] == 0.1
