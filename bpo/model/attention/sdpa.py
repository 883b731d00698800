"""PyTorch's SDPA over a packed row: two calls per group, one for the prefix and one for all its completions.

Shape letters: B batch (always 1), H query heads, K key heads, T packed tokens, D head size, C tokens of a group's
completions, P tokens of its prefix.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bpo.model.attention.rows import to_device
from bpo.records import PackedLayout


class GroupMask(NamedTuple):
    """A group's rows [start, prefix_end) and [prefix_end, end), and its completions' mask over [start, end)."""

    start: int
    prefix_end: int
    end: int
    sees_CPC: torch.Tensor | None


def sdpa_plan(layout: PackedLayout, device: torch.device) -> list[GroupMask]:
    """The masks of `layout`: boolean, [C, P + C] per group."""
    plan = []
    for (start, prefix_end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        end = completions[-1][1] if completions else prefix_end
        mask = _completion_mask(prefix_end - start, [b - a for a, b in completions]) if completions else None
        plan.append(GroupMask(start, prefix_end, end, mask if mask is None else to_device(mask, device)))
    return plan


def _completion_mask(prefix_length: int, lengths: list[int]) -> torch.Tensor:
    """[C, P + C] mask: the whole prefix, and the own completion up to the query."""
    own = torch.block_diag(*(torch.ones(length, length, dtype=torch.bool).tril() for length in lengths)).bool()
    return F.pad(own, (prefix_length, 0), value=True)


def sdpa_attend(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    plan: list[GroupMask],
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every group's prefix and completions, [B, T, H, D] in the dtype of `query_BHTD`.

    The prefix's keys and values are read in place, not copied per completion.
    """
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    outputs = []
    # Split into groups before slicing: the gradient of a slice has the size of its source, so slicing the whole row per
    # group would have quadratic cost in the number of groups.
    sizes = [end - start for start, _, end, _ in plan]
    groups = zip(plan, *(x.split(sizes, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD)), strict=True)
    for (start, prefix_end, _, mask), query, key, value in groups:
        prefix = slice(0, prefix_end - start)
        outputs.append(attend(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], is_causal=True))
        if mask is not None:
            outputs.append(attend(query[:, :, prefix.stop :], key, value, attn_mask=mask))
    # Transposed before concatenation: a single copy, in the memory order that the next layer reads.
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)
