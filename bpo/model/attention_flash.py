"""flash-attn over a packed row: one variable-length call a layer.

Each completion is a sequence whose queries are its own tokens and whose keys are its prefix and its own tokens, under a
causal mask aligned bottom-right. A prefix and its first completion lie side by side in the row and are one ordinary
causal sequence, so that a group of n completions needs n copies of its prefix's keys and not n + 1.

Shape letters: B batch (always 1), H query heads, K key heads, T packed tokens, D head size, S sequences, R gathered
rows of keys, F = K * D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from bpo.model.packed_rows import to_device
from bpo.records import PackedLayout


@cache
def varlen_function() -> Callable[..., torch.Tensor]:
    """flash-attn's function, and the one place that looks it up: whatever replaces it must keep its contract."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Where the sequences of a packed row begin, and which keys they read; all tensors int32, on the device.

    cu_seqlens_q_S1, cu_seqlens_k_S1: first query and first gathered key of each sequence, and the ends.
    max_seqlen_q, max_seqlen_k: tokens of the longest.
    rows_R: the packed token whose key and value stand at each gathered place.
    places_R, place_starts_T: the places of each packed token, token by token.
    """

    cu_seqlens_q_S1: torch.Tensor
    cu_seqlens_k_S1: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    rows_R: torch.Tensor
    places_R: torch.Tensor
    place_starts_T: torch.Tensor

    @property
    def repeats(self) -> bool:
        """Whether some key is read by several sequences; otherwise the row is as it must be."""
        return len(self.rows_R) != len(self.place_starts_T)


def flash_plan(layout: PackedLayout, device: torch.device) -> VarlenPlan:
    """The plan of `layout`, made on the CPU and copied in one transfer; nothing waits for the device."""
    query_lengths, key_spans = [], []
    for prefix, completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        end_of_first = completions[0][1] if completions else prefix[1]
        query_lengths += [end_of_first - prefix[0], *(end - start for start, end in completions[1:])]
        key_spans += [((prefix[0], end_of_first),), *((prefix, completion) for completion in completions[1:])]
    key_lengths = [sum(end - start for start, end in spans) for spans in key_spans]
    rows_R = torch.cat([torch.arange(*span) for spans in key_spans for span in spans])
    num_places_T = torch.bincount(rows_R)
    parts = (
        torch.tensor([0, *itertools.accumulate(query_lengths)]),
        torch.tensor([0, *itertools.accumulate(key_lengths)]),
        rows_R,
        rows_R.argsort(stable=True),
        num_places_T.cumsum(0) - num_places_T,
    )
    moved = to_device(torch.cat(parts).to(torch.int32), device).split([len(part) for part in parts])
    return VarlenPlan(moved[0], moved[1], max(query_lengths), max(key_lengths), *moved[2:])


class _GatherRows(torch.autograd.Function):
    """source[rows], whose gradient has the same bits every time.

    On CUDA the gradient of `index_select` adds the copies of a row with atomics, in any order, and rounds to bf16 each
    time. `embedding_bag` sums them one after the other in fp32 and rounds once, in one launch without temporaries.
    """

    @staticmethod
    def forward(ctx: Any, source_TKD: torch.Tensor, plan: VarlenPlan) -> torch.Tensor:
        ctx.plan = plan
        return source_TKD.index_select(0, plan.rows_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_RKD: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan = ctx.plan
        gradient_TF = F.embedding_bag(
            plan.places_R, gradient_RKD.flatten(1).contiguous(), plan.place_starts_T, mode="sum"
        )
        return gradient_TF.unflatten(1, gradient_RKD.shape[1:]), None


def flash_attend(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    plan: VarlenPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every group's prefix and completions, [B, T, H, D] in the dtype of `query_BHTD`.

    flash-attn's backward pass adds the gradient of the queries with atomics, unless
    `torch.use_deterministic_algorithms` is on.
    """
    query_THD, key_TKD, value_TKD = (one[0].transpose(0, 1) for one in (query_BHTD, key_BKTD, value_BKTD))
    if plan.repeats:
        key_TKD, value_TKD = _GatherRows.apply(key_TKD, plan), _GatherRows.apply(value_TKD, plan)
    output_THD = varlen_function()(
        query_THD,
        key_TKD,
        value_TKD,
        cu_seqlens_q=plan.cu_seqlens_q_S1,
        cu_seqlens_k=plan.cu_seqlens_k_S1,
        max_seqlen_q=plan.max_seqlen_q,
        max_seqlen_k=plan.max_seqlen_k,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output_THD[None]
