"""flash-attn's variable-length attention in plain PyTorch: the same contract, for machines without a GPU."""

from __future__ import annotations

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each sequence i, of queries q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]] and keys alike.

    The signature is that of flash-attn 2.8 (tests/gpu/test_attention_gpu.py compares it where that is installed), and
    so is the mask: with n queries and m keys, query i sees the keys up to i + m - n.

    Args:
        q: [total queries, heads, head size].
        k: [total keys, key heads, head size]; v alike.
        cu_seqlens_q: [sequences + 1] int32; cu_seqlens_k alike.

    Raises:
        ValueError: where flash-attn would read what it must not, or this function leaves an option out.
    """
    for name, offsets, rows, longest in (("q", cu_seqlens_q, q, max_seqlen_q), ("k", cu_seqlens_k, k, max_seqlen_k)):
        if offsets.dtype != torch.int32 or not offsets.is_contiguous() or rows.stride(-1) != 1:
            raise ValueError(f"cu_seqlens_{name} must be contiguous int32, and heads contiguous")
        lengths = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(rows) or int(lengths.min()) < 0:
            raise ValueError(f"cu_seqlens_{name} does not cover its {len(rows)} rows")
        if int(lengths.max()) != longest:
            raise ValueError(f"max_seqlen_{name} is {longest}, the longest sequence has {int(lengths.max())}")
    if dropout_p or softcap or alibi_slopes is not None or return_attn_probs or block_table is not None:
        raise ValueError("this stand-in leaves out dropout, softcap, alibi, probabilities and block tables")
    if tuple(window_size) != (-1, -1) or q.shape[1] % k.shape[1]:
        raise ValueError("this stand-in leaves out windows; key heads must divide query heads")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    repeat = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys, values = (
            one[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(repeat, 1).to(queries.dtype) for one in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if causal:
            is_late = torch.ones_like(scores[0], dtype=torch.bool).triu(len(keys) - len(queries) + 1)
            scores = scores.masked_fill(is_late, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)
