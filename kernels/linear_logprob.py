"""Log-probs of the targets from hidden states: the vendor's GEMM per chunk of rows, and one Triton kernel per chunk.

Legend: N rows (response tokens), n rows of one chunk, H hidden size, V vocabulary.

The kernel reads the fp32 logits of a chunk, writes log-probs and, where a gradient is needed, D = onehot - softmax
(times the slopes of cap and scale), which is all that backward needs: the loss enters there as one coefficient c per
row, `grad_hidden = c * (D @ W)` and `grad_weight = D.T @ (c * hidden)`. See README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import align, autocast_hidden, check_linear_logprob, check_triton_dtype, mm_fp32, rows_per_chunk
from .logprob_gather import NUM_WARPS, block_v, online_softmax_update


@triton.jit
def capped_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """`softcap * tanh(scale * (z + bias) / softcap)`."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def logprob_rows_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    logp_ptr,
    dlogits_ptr,
    V,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_DLOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * V
    row_max = tl.full([], -float("inf"), tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        z = tl.load(logits_row + column, mask=inside, other=0.0).to(tl.float32)
        z = capped_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(inside, z, -float("inf"))
        row_max, row_sum = online_softmax_update(row_max, row_sum, z)

    target = tl.load(target_ptr + row).to(tl.int64)
    in_range = (target >= 0) & (target < V)
    target_logit = tl.load(logits_row + target, mask=in_range, other=float("nan")).to(tl.float32)
    target_logit = capped_logits(target_logit, target, in_range, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    tl.store(logp_ptr + row, target_logit - row_max - tl.log(row_sum))

    if WITH_DLOGITS:
        # dlogits may be the logits' own memory: a tile is read whole before it is written.
        dlogits_row = dlogits_ptr + row * V
        inverse_sum = 1.0 / row_sum
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            inside = column < V
            z = tl.load(logits_row + column, mask=inside, other=0.0).to(tl.float32)
            z = capped_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
            dlogits = (tl.where(column == target, 1.0, 0.0) - tl.exp(z - row_max) * inverse_sum) * scale
            if HAS_SOFTCAP:
                dlogits *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(dlogits_row + column, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def logprob_rows(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    target_n: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    with_dlogits: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [n] of one chunk and, if asked, D [n, V] in the hidden states' dtype."""
    logits_nV = mm_fp32(hidden_nH, weight_VH.t())
    num_rows, vocab = logits_nV.shape
    logp_n = torch.empty(num_rows, dtype=torch.float32, device=hidden_nH.device)
    in_place = hidden_nH.dtype is logits_nV.dtype or not with_dlogits
    dlogits_nV = logits_nV if in_place else torch.empty_like(logits_nV, dtype=hidden_nH.dtype)
    with torch.cuda.device_of(logits_nV):
        logprob_rows_kernel[(num_rows,)](
            logits_nV,
            bias_V,
            align(target_n),
            logp_n,
            dlogits_nV,
            vocab,
            softcap or 1.0,
            scale,
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=softcap is not None,
            WITH_DLOGITS=with_dlogits,
            BLOCK_V=block_v(vocab),
            num_warps=NUM_WARPS,
        )
    return logp_n, dlogits_nV if with_dlogits else None


@torch.library.custom_op("bpo_kernels::linear_logprob_fwd", mutates_args=())
def _forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    step: int,
    keeps_hidden_grad: bool,
    keeps_dlogits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N]; D @ W [N, H] or empty; D [N, V] or empty."""
    num_rows = hidden_NH.shape[0]
    weight_VH = weight_VH.to(hidden_NH.dtype)
    logp_N = torch.empty(num_rows, dtype=torch.float32, device=hidden_NH.device)
    unit_grad_NH = hidden_NH.new_empty(hidden_NH.shape if keeps_hidden_grad else (0, 0))
    dlogits_NV = hidden_NH.new_empty(0, weight_VH.shape[0])
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            logp_N[rows], dlogits_nV = logprob_rows(
                hidden_NH[rows], weight_VH, target_N[rows], bias_V, softcap, scale, keeps_hidden_grad or keeps_dlogits
            )
            if keeps_hidden_grad:
                torch.mm(dlogits_nV, weight_VH, out=unit_grad_NH[rows])
            if keeps_dlogits:
                dlogits_NV = dlogits_nV
    return logp_N, unit_grad_NH, dlogits_NV


@_forward.register_fake
def _(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    step: int,
    keeps_hidden_grad: bool,
    keeps_dlogits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32),
        hidden_NH.new_empty(hidden_NH.shape if keeps_hidden_grad else (0, 0)),
        hidden_NH.new_empty(hidden_NH.shape[0] if keeps_dlogits else 0, weight_VH.shape[0]),
    )


@torch.library.custom_op("bpo_kernels::linear_logprob_bwd", mutates_args=())
def _backward(
    grad_logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    kept_dlogits_NV: Tensor,
    softcap: float | None,
    scale: float,
    step: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not needed."""
    num_rows, dtype = hidden_NH.shape[0], hidden_NH.dtype
    weight = weight_VH.to(dtype)
    grad_hidden_NH = hidden_NH.new_empty(hidden_NH.shape if needs_hidden else (0, 0))
    grad_weight_VH = hidden_NH.new_zeros(weight.shape if needs_weight else (0, 0), dtype=torch.float32)
    grad_bias_V = hidden_NH.new_zeros(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            coefficient_n1 = grad_logp_N[rows, None]
            dlogits_nV = kept_dlogits_NV
            if kept_dlogits_NV.shape[0] == 0:
                _, dlogits_nV = logprob_rows(hidden_NH[rows], weight, target_N[rows], bias_V, softcap, scale, True)
            if needs_hidden:
                grad_hidden_NH[rows] = coefficient_n1 * torch.mm(dlogits_nV, weight)
            if needs_weight:
                # The coefficient scales the small operand: n x H products instead of n x V.
                scaled_nH = (coefficient_n1 * hidden_NH[rows]).to(dtype)
                if step >= num_rows:
                    grad_weight_VH = torch.mm(dlogits_nV.t(), scaled_nH)
                else:
                    grad_weight_VH += mm_fp32(dlogits_nV.t(), scaled_nH)
            if needs_bias:
                grad_bias_V += (coefficient_n1.t() @ dlogits_nV.float())[0]
    bias_dtype = dtype if bias_V is None else bias_V.dtype
    return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), grad_bias_V.to(bias_dtype)


@_backward.register_fake
def _(
    grad_logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    kept_dlogits_NV: Tensor,
    softcap: float | None,
    scale: float,
    step: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = hidden_NH.dtype if bias_V is None else bias_V.dtype
    return (
        hidden_NH.new_empty(hidden_NH.shape if needs_hidden else (0, 0)),
        weight_VH.new_empty(weight_VH.shape if needs_weight else (0, 0)),
        hidden_NH.new_empty(weight_VH.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_NH, weight_VH, target_N, bias_V, ctx.softcap, ctx.scale, ctx.step, ctx.keeps_hidden_grad, _ = inputs
    _, unit_grad_NH, dlogits_NV = output
    ctx.set_materialize_grads(False)
    # The weight itself, never a view of it: ZeRO-3 gathers the parameter again before the backward.
    ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, dlogits_NV)


def _gradient(ctx: Any, grad_logp_N: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, dlogits_NV = ctx.saved_tensors
    unused = [None] * 5
    if grad_logp_N is None:
        return None, None, None, None, *unused
    if ctx.keeps_hidden_grad:
        grad_hidden_NH = (unit_grad_NH * grad_logp_N[:, None]).to(hidden_NH.dtype)
        return grad_hidden_NH, None, None, None, *unused
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    grad_hidden_NH, grad_weight_VH, grad_bias_V = _backward(
        grad_logp_N,
        hidden_NH,
        weight_VH,
        target_N,
        bias_V,
        dlogits_NV,
        ctx.softcap,
        ctx.scale,
        ctx.step,
        needs_hidden,
        needs_weight,
        needs_bias,
    )
    return (
        grad_hidden_NH if needs_hidden else None,
        grad_weight_VH if needs_weight else None,
        None,
        grad_bias_V if needs_bias else None,
        *unused,
    )


_forward.register_autograd(_gradient, setup_context=_save)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    *,
    budget_bytes: int | None = None,
) -> Tensor:
    """Log-probs of the targets, never the [N, V] logits of all rows; see `reference.linear_logprob`.

    On CUDA a target outside [0, V) is not looked for; its log-prob is NaN.
    """
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, budget_bytes)
    check_triton_dtype("hidden_NH", hidden_NH)
    hidden_NH = autocast_hidden(hidden_NH)
    num_rows, vocab = hidden_NH.shape[0], weight_VH.shape[0]
    step = rows_per_chunk(num_rows, vocab, torch.float32.itemsize, budget_bytes, hidden_NH.device)
    grad = torch.is_grad_enabled()
    needs_head = grad and (weight_VH.requires_grad or (bias is not None and bias.requires_grad))
    keeps_hidden_grad = grad and hidden_NH.requires_grad and not needs_head
    return _forward(
        hidden_NH,
        weight_VH,
        target_N.contiguous(),
        bias,
        softcap,
        scale,
        step,
        keeps_hidden_grad,
        needs_head and step >= num_rows,
    )[0]
