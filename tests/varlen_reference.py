"""The variable-length attention of flash-attn 2, flash-attn 3 and PyTorch without a GPU, in plain PyTorch.

flash-attn's functions are replaced: same signature, and below them operators of the same names and arguments, which
selective checkpointing and FLOP counters see. PyTorch's function is the real one; the kernel that it calls is replaced.

Shape letters: Q queries and M keys of a sequence, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch


def check_contract(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
) -> None:
    """Rejects inputs that the kernels would misread.

    Raises:
        ValueError: names the argument.
    """
    for name, offsets, rows, most in (("q", starts[0], q, longest[0]), ("k", starts[1], k, longest[1])):
        if offsets.dtype != torch.int32 or not offsets.is_contiguous() or rows.stride(-1) != 1:
            raise ValueError(f"cu_seqlens_{name} must be contiguous int32, and heads contiguous")
        lengths = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(rows) or int(lengths.min()) < 0:
            raise ValueError(f"cu_seqlens_{name} does not cover its {len(rows)} rows")
        if int(lengths.max()) != most:
            raise ValueError(f"max_seqlen_{name} is {most}, the longest sequence has {int(lengths.max())}")
    if q.shape[1] % k.shape[1] or k.shape != v.shape:
        raise ValueError("key heads must divide query heads, and values be as keys")


def _probabilities(q_QHD: torch.Tensor, k_MHD: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """[H, Q, M]; with fewer queries than keys, query i attends to keys up to i + M - Q."""
    scores_HQM = torch.einsum("qhd,mhd->hqm", q_QHD, k_MHD) * scale
    if causal:
        late_QM = torch.ones_like(scores_HQM[0], dtype=torch.bool).triu(len(k_MHD) - len(q_QHD) + 1)
        scores_HQM = scores_HQM.masked_fill(late_QM, float("-inf"))
    return scores_HQM.softmax(-1)


def _sequences(starts: tuple[torch.Tensor, torch.Tensor]) -> Iterator[tuple[slice, slice]]:
    rows = ([slice(a, b) for a, b in zip(one.tolist(), one.tolist()[1:], strict=False)] for one in starts)
    return zip(*rows, strict=True)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Any, scale: float | None, causal: bool
) -> torch.Tensor:
    """Attention of each sequence i: queries q[starts[0][i]:starts[0][i + 1]], and keys alike from starts[1]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outputs = [
        torch.einsum("hqm,mhd->qhd", _probabilities(q[queries], k[keys], scale, causal), v[keys])
        for queries, keys in _sequences(starts)
    ]
    return torch.cat(outputs)


def gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: Any,
    scale: float | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend`'s queries, keys and values."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[1] // k.shape[1]
    k_all, v_all = (x.repeat_interleave(repeat, 1) for x in (k, v))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k_all), torch.zeros_like(v_all)
    for queries, keys in _sequences(starts):
        p_HQM = _probabilities(q[queries], k_all[keys], scale, causal)
        dv[keys] = torch.einsum("hqm,qhd->mhd", p_HQM, dout[queries])
        dp_HQM = torch.einsum("qhd,mhd->hqm", dout[queries], v_all[keys])
        ds_HQM = p_HQM * (dp_HQM - (dp_HQM * p_HQM).sum(-1, keepdim=True)) * scale
        dq[queries] = torch.einsum("hqm,mhd->qhd", ds_HQM, k_all[keys])
        dk[keys] = torch.einsum("hqm,qhd->mhd", ds_HQM, q[queries])
    return dq, *(x.unflatten(1, (-1, repeat)).sum(2) for x in (dk, dv))


def _no_log_sums(q: torch.Tensor) -> torch.Tensor:
    """Replaces the log-sum-exps, which these kernels do not need for their gradients."""
    return torch.zeros(q.shape[1], len(q), dtype=torch.float32)


@functools.cache
def install_operators() -> None:
    """Defines missing operators of flash-attn, and PyTorch's flash attention on CPUs."""
    if not hasattr(torch.ops.flash_attn, "_flash_attn_varlen_forward"):
        torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())(_flash_2_forward)
        torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))(
            _flash_2_backward
        )
    if not hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"):
        torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())(_flash_3_forward)
        torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))(
            _flash_3_backward
        )
    torch.library.impl("aten::_flash_attention_forward", "CPU", func=_aten_forward)
    torch.library.impl("aten::_flash_attention_backward", "CPU", func=_aten_backward)


def _flash_2_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if dropout_p:
        raise ValueError("this stand-in has no dropout")
    starts = (cu_seqlens_q, cu_seqlens_k)
    check_contract(q, k, v, starts, (max_seqlen_q, max_seqlen_k))
    return attend(q, k, v, starts, softmax_scale, causal), _no_log_sums(q)


def _flash_2_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> torch.Tensor:
    found = gradients(dout, q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, causal)
    for gradient, value in zip((dq, dk, dv), found, strict=True):
        gradient.copy_(value)
    return torch.zeros_like(softmax_lse)


def _flash_3_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    assert max_seqlen_q is not None and max_seqlen_k is not None
    starts = (cu_seqlens_q, cu_seqlens_k)
    check_contract(q, k, v, starts, (max_seqlen_q, max_seqlen_k))
    return attend(q, k, v, starts, softmax_scale, causal), _no_log_sums(q)


def _flash_3_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    deterministic: bool = False,
) -> torch.Tensor:
    found = gradients(dout, q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, is_causal)
    for gradient, value in zip((dq, dk, dv), found, strict=True):
        gradient.copy_(value)
    return torch.zeros_like(softmax_lse)


def _check_window(is_causal: bool, left: int | None, right: int | None) -> None:
    if (left, right) != ((-1, 0) if is_causal else (-1, -1)):
        raise ValueError(f"this stand-in has no window ({left}, {right})")


def _aten_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, ...]:
    """The kernel under `varlen_attn`, whose function fixes dropout at 0."""
    _check_window(is_causal, window_size_left, window_size_right)
    check_contract(query, key, value, (cum_seq_q, cum_seq_k), (max_q, max_k))
    output = attend(query, key, value, (cum_seq_q, cum_seq_k), scale, is_causal)
    state, empty = torch.zeros(2, dtype=torch.uint64), torch.zeros(0)
    return output, _no_log_sums(query), state, empty, empty.clone()


def _aten_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    _check_window(is_causal, window_size_left, window_size_right)
    return gradients(grad_out, query, key, value, (cum_seq_q, cum_seq_k), scale, is_causal)


class _Flash2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, starts: Any, longest: Any, *options: Any) -> torch.Tensor:
        dropout_p, scale, causal, deterministic = options
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, sums = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, *starts, *longest, dropout_p, scale, causal
        )
        ctx.save_for_backward(q, k, v, out, sums, *starts)
        ctx.options = scale, causal, deterministic
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, sums, *starts = ctx.saved_tensors
        made = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn._flash_attn_varlen_backward(dout, q, k, v, out, sums, *made, *starts, *ctx.options)
        return *made, *(None,) * 6


class _Flash3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, starts: Any, longest: Any, *options: Any) -> torch.Tensor:
        scale, causal, deterministic = options
        out, sums = torch.ops.flash_attn_3._flash_attn_forward(q, k, v, *starts, *longest, scale, causal)
        ctx.save_for_backward(q, k, v, out, sums, *starts)
        ctx.options = scale, causal, deterministic
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, sums, *starts = ctx.saved_tensors
        made = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn_3._flash_attn_backward(dout, q, k, v, out, sums, *starts, *made, *ctx.options)
        return *made, *(None,) * 5


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
    """flash-attn 2.8's function; tests/gpu/test_attention_gpu.py compares the signature where it is installed.

    Raises:
        ValueError: where flash-attn would read what it must not, or this function leaves an option out.
    """
    if softcap or alibi_slopes is not None or return_attn_probs or block_table is not None or window_size != (-1, -1):
        raise ValueError("this stand-in leaves out softcap, alibi, probabilities, block tables and windows")
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _Flash2.apply(q, k, v, starts, longest, dropout_p, softmax_scale, causal, deterministic)


def flash_attn_3_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """flash-attn 3's function; tests/gpu/test_attention_gpu.py compares the signature where it is installed.

    Raises:
        ValueError: as `flash_attn_varlen_func`.
    """
    left_out = (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale, pack_gqa)
    if any(x is not None for x in left_out) or window_size != (-1, -1) or num_splits != 1:
        raise ValueError("this stand-in leaves out used lengths, scales, windows and splits")
    if attention_chunk or softcap or sm_margin or return_attn_probs:
        raise ValueError("this stand-in leaves out chunks, softcap, margins and probabilities")
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _Flash3.apply(q, k, v, starts, longest, softmax_scale, causal, deterministic)
