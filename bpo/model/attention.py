"""Attention over packed groups that share their prefixes.

A completion attends to its own prefix and to itself, causally, and never to a sibling. The function is registered with
transformers for the text model only; without a layout it is ordinary SDPA, so the same model also generates.

Shape letters: B batch (always 1 while packed), H heads, T packed tokens, D head size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from bpo.records import PackedLayout

NAME = "bpo_shared_prefix"
logger = logging.getLogger(__name__)

# A plain global and not a context variable: the backward pass of CUDA runs in a thread of its own, where gradient
# checkpointing calls the attention again.
_layouts: list[PackedLayout] = []


@contextlib.contextmanager
def packed_layout(layout: PackedLayout) -> Iterator[None]:
    """Makes attention follow `layout`; must span forward *and* backward (checkpointing recomputes there)."""
    _layouts.append(layout)
    try:
        yield
    finally:
        _layouts.pop()
        _suffix_mask.cache_clear()


@cache
def _suffix_mask(prefix_length: int, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[sum(lengths), prefix_length + sum(lengths)] boolean mask: own prefix, own completion up to itself.

    Made once for all layers of a packed batch and dropped with it: no two batches need the same lengths.
    """
    mask = torch.zeros(sum(lengths), prefix_length + sum(lengths), dtype=torch.bool)
    mask[:, :prefix_length] = True
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        mask[own, prefix_length + start : prefix_length + start + length] = torch.ones(length, length).tril().bool()
        start += length
    return mask.to(device)


def shared_prefix_attention(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention of every group's prefix and completions.

    Equals, for each completion, `F.scaled_dot_product_attention(q, k, v, is_causal=True)` on [prefix | completion]
    alone; keys and values of the prefix are read, not copied per completion. Grouped-query heads are allowed.

    Returns:
        [B, H, T, D] in the dtype of `query_BHTD`.
    """
    grouped = query_BHTD.shape[1] != key_BHTD.shape[1]
    outputs = []
    for (start, prefix_end), completions in zip(layout.prefix_spans, layout.completion_spans, strict=True):
        end = completions[-1][1] if completions else prefix_end
        outputs.append(
            F.scaled_dot_product_attention(
                query_BHTD[:, :, start:prefix_end],
                key_BHTD[:, :, start:prefix_end],
                value_BHTD[:, :, start:prefix_end],
                is_causal=True,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
        if completions:
            lengths = tuple(b - a for a, b in completions)
            outputs.append(
                F.scaled_dot_product_attention(
                    query_BHTD[:, :, prefix_end:end],
                    key_BHTD[:, :, start:end],
                    value_BHTD[:, :, start:end],
                    attn_mask=_suffix_mask(prefix_end - start, lengths, query_BHTD.device),
                    dropout_p=dropout,
                    scale=scaling,
                    enable_gqa=grouped,
                )
            )
    return torch.cat(outputs, dim=2)


def _attention_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if not _layouts:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("sliding_window"):
        raise ValueError("sliding-window attention cannot share prefixes; use a model without sliding windows")
    output_BHTD = shared_prefix_attention(query, key, value, _layouts[-1], scaling, dropout)
    return output_BHTD.transpose(1, 2).contiguous(), None


def _mask_interface(*args: Any, **kwargs: Any) -> Any:
    if _layouts:
        return None  # the layout is the mask
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


@cache
def register() -> str:
    """Registers the attention with transformers; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_interface)
    AttentionMaskInterface.register(NAME, _mask_interface)
    logger.info("attention over packed groups: PyTorch SDPA, two calls a group")
    return NAME
