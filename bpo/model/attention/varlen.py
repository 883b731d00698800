"""Variable-length attention over a packed row: one call per layer.

Each completion is a sequence whose queries are its own tokens and whose keys are its prefix and its own tokens, with a
causal mask aligned bottom-right. A prefix and its first completion are adjacent in the row and form one ordinary causal
sequence, so a group of n completions needs n instead of n + 1 copies of its prefix's keys.

Shape letters: B batch (always 1), H query heads, K key heads, T packed tokens, D head size, S sequences, R gathered
rows of keys, F = K * D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bpo.model.attention.rows import causal_sequences, to_device
from bpo.records import PackedLayout


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Boundaries and gathered keys of the sequences of a packed row; all tensors int32, on the device.

    cu_seqlens_q_S1, cu_seqlens_k_S1: first query and first gathered key of each sequence, and the ends.
    max_seqlen_q, max_seqlen_k: tokens of the longest sequence.
    rows_R: the packed token whose key and value are gathered to each place.
    places_R, place_starts_T: the places of each packed token, grouped by token.
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
        """Whether any key is read by several sequences; otherwise no gather is needed."""
        return len(self.rows_R) != len(self.place_starts_T)


def varlen_plan(layout: PackedLayout, device: torch.device) -> VarlenPlan:
    """The plan of `layout`, built on the CPU and copied in one transfer without a device synchronization."""
    sequences = causal_sequences(layout)
    query_lengths = [sequence.num_queries for sequence in sequences]
    key_lengths = [sequence.num_keys for sequence in sequences]
    rows_R = torch.cat([torch.arange(*span) for sequence in sequences for span in sequence.key_spans])
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
    """source[rows] with a deterministic gradient.

    On CUDA the gradient of `index_select` adds the copies of a row with atomics, in any order, and rounds to bf16 each
    time. `embedding_bag` sums them sequentially in fp32 and rounds once, in one launch without temporaries.
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


def varlen_attend(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    plan: VarlenPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    kernel: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention of every group's prefix and completions, [B, T, H, D] in the dtype of `query_BHTD`.

    Args:
        kernel: One of `bpo.model.attention.flash`.
    """
    query_THD, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query_BHTD, key_BKTD, value_BKTD))
    if plan.repeats:
        key_TKD, value_TKD = _GatherRows.apply(key_TKD, plan), _GatherRows.apply(value_TKD, plan)
    return kernel(query_THD, key_TKD, value_TKD, plan, scaling, dropout)[None]
