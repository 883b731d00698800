"""Attention over a packed row in two calls per layer, without copies of keys: own tokens, then prefixes.

The first call attends causally within each sequence of its own tokens: a prefix with its first completion, and each
further completion alone. In the second, the further completions of a group, as one sequence, attend to their prefix.
Both results are merged by their log-sum-exps. The backward pass calls the kernel's own once per part, with the merged
output and log-sum-exps: the gradient of attention over a set of keys needs nothing else of the other keys.

Shape letters: B batch (always 1), H query heads, K key heads, T packed tokens, D head size, S sequences, C tokens of
further completions, P tokens of their prefixes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch

from bpo.model.attention.rows import to_device
from bpo.records import PackedLayout
from bpo_kernels.dispatch import add_rows, merge_rows


class Sequences(NamedTuple):
    """Boundaries of sequences of queries and keys [S + 1], int32, and the longest of each."""

    cu_seqlens_q_S1: torch.Tensor
    cu_seqlens_k_S1: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class SplitPlan(NamedTuple):
    """Sequences of both calls. rows_C, rows_P: packed tokens of the second call's queries and keys, int32.

    `prefixes` is None if no group has a second completion.
    """

    own: Sequences
    prefixes: Sequences | None
    rows_C: torch.Tensor
    rows_P: torch.Tensor


class FlashKernel(NamedTuple):
    """A kernel of the flash-attention family.

    Attributes:
        forward: (q_THD, k_RKD, v_RKD, sequences, causal, scale) -> output [T, H, D], log-sum-exps [H, T] in fp32.
        backward: (gradient_THD, q, k, v, output, log-sum-exps, sequences, causal, scale) -> gradients of q, k, v.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def split_plan(layout: PackedLayout, device: torch.device) -> SplitPlan:
    """The plan of `layout`, built on the CPU and copied in one transfer without a device synchronization."""
    own, queries, keys = [], [], []
    rows_C, rows_P = [], []
    for (start, prefix_end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        own.append((completions[0][1] if completions else prefix_end) - start)
        if len(completions) > 1:
            own += [end - begin for begin, end in completions[1:]]
            rows_C.append(torch.arange(completions[1][0], completions[-1][1]))
            rows_P.append(torch.arange(start, prefix_end))
            queries.append(len(rows_C[-1]))
            keys.append(prefix_end - start)
    parts = [_starts(lengths) for lengths in (own, queries, keys)] + [_joined(rows_C), _joined(rows_P)]
    moved = to_device(torch.cat(parts).to(torch.int32), device).split([len(part) for part in parts])
    prefixes = Sequences(moved[1], moved[2], max(queries), max(keys)) if queries else None
    return SplitPlan(Sequences(moved[0], moved[0], max(own), max(own)), prefixes, moved[3], moved[4])


def _starts(lengths: Iterable[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


@cache
def torch_flash_kernel() -> FlashKernel:
    """The operators below PyTorch's `varlen_attn`, whose leading arguments 2.11 and 2.13 share.

    Later versions require `enable_gqa` for grouped heads; see `flash.torch_varlen_attn`.
    """
    from torch.nn.attention import varlen

    operators: Any = torch.ops.torch_attn
    names = [argument.name for argument in operators._varlen_attn.default._schema.arguments]
    grouped = {"enable_gqa": True} if "enable_gqa" in names else {}
    assert varlen is not None  # its import defines the operators

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, causal: bool, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        window = [-1, 0] if causal else [-1, -1]
        output, lse, _ = operators._varlen_attn(q, k, v, *sequences, causal, scale, window, **grouped)
        return output, lse

    def backward(
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        sequences: Sequences,
        causal: bool,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        window = [-1, 0] if causal else [-1, -1]
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = operators._varlen_attn_backward(
            gradient, q, k, v, output, lse, *sequences, causal, no_dropout, scale, window
        )
        return gradients

    return FlashKernel(forward, backward)


class _Split(torch.autograd.Function):
    """Both calls and the merge. Saves queries, keys, values, the output and its log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        plan: SplitPlan,
        scaling: float | None,
    ) -> torch.Tensor:
        kernel = torch_flash_kernel()
        output_THD, lse_HT = kernel.forward(query_THD, key_TKD, value_TKD, plan.own, True, scaling)
        if plan.prefixes is not None:
            query_CHD = query_THD.index_select(0, plan.rows_C)
            key_PKD, value_PKD = key_TKD.index_select(0, plan.rows_P), value_TKD.index_select(0, plan.rows_P)
            part_CHD, part_lse_HC = kernel.forward(query_CHD, key_PKD, value_PKD, plan.prefixes, False, scaling)
            merge_rows(output_THD, lse_HT, plan.rows_C, part_CHD, part_lse_HC)
        ctx.save_for_backward(query_THD, key_TKD, value_TKD, output_THD, lse_HT)
        ctx.plan, ctx.scaling = plan, scaling
        return output_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_THD: torch.Tensor) -> tuple[Any, ...]:
        query_THD, key_TKD, value_TKD, output_THD, lse_HT = ctx.saved_tensors
        plan, scaling, kernel = ctx.plan, ctx.scaling, torch_flash_kernel()
        gradient_THD = gradient_THD.contiguous()
        saved = (gradient_THD, query_THD, key_TKD, value_TKD, output_THD, lse_HT)
        of_query, of_key, of_value = kernel.backward(*saved, plan.own, True, scaling)
        if plan.prefixes is not None:
            gradient_CHD, query_CHD, output_CHD = (
                tensor.index_select(0, plan.rows_C) for tensor in (gradient_THD, query_THD, output_THD)
            )
            key_PKD, value_PKD = key_TKD.index_select(0, plan.rows_P), value_TKD.index_select(0, plan.rows_P)
            lse_HC = lse_HT.index_select(1, plan.rows_C)
            parts = kernel.backward(
                gradient_CHD, query_CHD, key_PKD, value_PKD, output_CHD, lse_HC, plan.prefixes, False, scaling
            )
            add_rows(of_query, plan.rows_C, parts[0])
            add_rows(of_key, plan.rows_P, parts[1])
            add_rows(of_value, plan.rows_P, parts[2])
        return of_query, of_key, of_value, None, None


def split_attend(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    plan: SplitPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every group's prefix and completions, [B, T, H, D] in the dtype of `query_BHTD`.

    Raises:
        ValueError: `dropout` is not 0.
    """
    if dropout:
        raise ValueError(f"split has no dropout, but the model's is {dropout}; set model.attention to sdpa")
    query_THD, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query_BHTD, key_BKTD, value_BKTD))
    output_THD: torch.Tensor = _Split.apply(query_THD, key_TKD, value_TKD, plan, scaling)
    return output_THD[None]
