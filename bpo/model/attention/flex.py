"""FlexAttention over a packed row: one compiled call per layer, which skips fully masked blocks of keys.

Shape letters: B batch (always 1), H query heads, K key heads, T packed tokens, D head size, Q blocks of 128 tokens,
S pieces: the rows of one segment in one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from bpo.model.attention.flops import count_compiled, sequence_pairs
from bpo.model.attention.rows import Segment, segments_of, to_device
from bpo.records import PackedLayout

BLOCK = 128

# Disables the variant for short queries, whose selection adds a guard on the length; packed rows are not short.
_KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


class FlexPlan(NamedTuple):
    """The block mask of a packed row, and its query-key pairs per head for the FLOP count."""

    mask: BlockMask
    counted_pairs: int


@cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled once for all row lengths.

    Passes with a graph (training and recomputation) share one compilation, passes without (the reference) another.
    Rows are not padded, because with dynamic shapes the kernel checks bounds anyway.
    """
    return torch.compile(flex_attention, dynamic=True)


def flex_plan(layout: PackedLayout, device: torch.device) -> FlexPlan:
    """The plan of `layout`. Its block mask equals that of `create_block_mask`, which would evaluate all T x T pairs.

    Pairs are counted on the CPU from the spans and copied in one transfer without a device synchronization.
    """
    segments = segments_of(layout)
    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    spans_3T = torch.tensor(segments)[:, :3].T.repeat_interleave(lengths, dim=1)
    num_tokens = spans_3T.shape[1]
    # At least two blocks: the compiler specializes on a size of 1 and would compile it separately.
    num_blocks = max(2, -(-num_tokens // BLOCK))
    pairs_QQ = _visible_pairs(segments, num_blocks)
    moved = to_device(torch.cat([spans_3T.flatten(), pairs_QQ.flatten()]).to(torch.int32), device)
    # Cloned, because each offset into a shared storage would add a symbol to the compiled code.
    prefix_start_T, prefix_end_T, start_T = (span_T.clone() for span_T in moved[: 3 * num_tokens].view(3, num_tokens))
    pairs_QQ = moved[3 * num_tokens :].view(num_blocks, num_blocks)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        in_prefix = (k >= prefix_start_T[q]) & (k < prefix_end_T[q])
        return in_prefix | ((k >= start_T[q]) & (k <= q))

    is_full_QQ = pairs_QQ == BLOCK * BLOCK
    mask = BlockMask.from_kv_blocks(
        *_as_lists((pairs_QQ > 0) & ~is_full_QQ),
        *_as_lists(is_full_QQ),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )
    for tensor in mask.as_tuple():
        if isinstance(tensor, torch.Tensor):
            # dynamic=True does not cover all of these: the first batch's number of blocks would be a constant.
            torch._dynamo.maybe_mark_dynamic(tensor, list(range(2, tensor.dim())))
    return FlexPlan(mask, sequence_pairs(layout))


def _visible_pairs(segments: list[Segment], num_blocks: int) -> torch.Tensor:
    """[Q, Q] number of visible pairs of a query in block i and a key in block j, computed from the spans."""
    pieces = [
        (*segment[:3], max(segment.start, block * BLOCK), min(segment.end, (block + 1) * BLOCK), block)
        for segment in segments
        for block in range(segment.start // BLOCK, -(-segment.end // BLOCK))
    ]
    prefix_start_S, prefix_end_S, start_S, first_S, last_S, block_S = torch.tensor(pieces)[:, :, None].unbind(1)
    key_Q = torch.arange(num_blocks) * BLOCK
    end_Q = key_Q + BLOCK
    in_prefix_SQ = (torch.minimum(prefix_end_S, end_Q) - torch.maximum(prefix_start_S, key_Q)).clamp(min=0)

    def pairs_from(key: torch.Tensor) -> torch.Tensor:
        """Pairs of a query r in [first, last) and a key in [key, r]: the sum of r + 1 - key over r >= key."""
        lowest = torch.maximum(first_S, key)
        return (last_S - lowest).clamp(min=0) * (lowest + last_S + 1 - 2 * key) // 2

    own_SQ = pairs_from(torch.maximum(start_S, key_Q).minimum(end_Q)) - pairs_from(end_Q)
    pairs_SQ = in_prefix_SQ * (last_S - first_S) + own_SQ
    return torch.zeros(num_blocks, num_blocks, dtype=torch.long).index_add_(0, block_S[:, 0], pairs_SQ)


def _as_lists(is_there_QQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1, Q] number of key blocks per query block; [B, 1, Q, Q] their indices, followed by all others."""
    which_QQ = is_there_QQ.int().argsort(dim=-1, descending=True, stable=True)
    return is_there_QQ.sum(-1, dtype=torch.int32)[None, None], which_QQ.int()[None, None]


def flex_attend(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    plan: FlexPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every group's prefix and completions, [B, T, H, D] in the dtype of `query_BHTD`.

    Raises:
        ValueError: `dropout` is not 0.
    """
    if dropout:
        raise ValueError(f"FlexAttention has no dropout, but the model's is {dropout}; set model.attention to sdpa")
    # Under a dispatch mode, such as a FLOP counter, nothing is compiled and FlexAttention stores all T x T scores.
    with _disable_current_modes():
        output_BHTD = compiled_flex_attention()(
            query_BHTD,
            key_BKTD,
            value_BKTD,
            block_mask=plan.mask,
            scale=scaling,
            enable_gqa=query_BHTD.shape[1] != key_BKTD.shape[1],
            kernel_options=_KERNEL_OPTIONS,
        )
    output_BHTD = count_compiled(output_BHTD, plan.counted_pairs, query_BHTD.shape[-1], value_BKTD.shape[-1])
    return output_BHTD.transpose(1, 2)
