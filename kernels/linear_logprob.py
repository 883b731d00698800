"""Log-probs of the targets from hidden states: the vendor's GEMM per chunk of rows, and one Triton kernel per chunk.

Legend: N rows (response tokens), n rows of one chunk, H hidden size, V vocabulary.

The kernel reads the fp32 logits of a chunk, writes log-probs and, where a gradient is needed, D = onehot - softmax
(times the slopes of cap and scale), which is all that backward needs. Chunks, modes and GEMMs are in head.py, the pass
without logits in fused_logprob.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import HALVES, IGNORED_TARGET, align, autocast_hidden, check_linear_logprob, check_triton_dtype
from .fused_logprob import finish_logits, fused_rows
from .head import Head, HeadPlan, RowOutputs, Rows, head_backward, head_forward, plan_head
from .logprob_gather import NUM_WARPS, block_v


@triton.jit
def online_moment_update(max_so_far, sum_so_far, moment_so_far, z):
    """One tile of logits into the running maximum, sum of exponentials and sum of exponential times logit."""
    new_max = tl.maximum(max_so_far, tl.max(z, 0))
    anchor = tl.where(new_max == -float("inf"), 0.0, new_max)
    # While all logits so far are -inf there is nothing to rescale: -inf times 0 would be NaN.
    shift = tl.where(max_so_far == -float("inf"), 0.0, max_so_far - anchor)
    exponential = tl.exp(z - anchor)
    moment = tl.sum(tl.where(exponential > 0.0, exponential * (z - anchor), 0.0), 0)
    moment += tl.exp(shift) * (moment_so_far + shift * sum_so_far)
    return new_max, tl.exp(shift) * sum_so_far + tl.sum(exponential, 0), moment


@triton.jit
def logprob_rows_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    argmax_ptr,
    dlogits_ptr,
    V,
    softcap,
    scale,
    IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    WITH_DLOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * V
    row_max = tl.full([], -float("inf"), tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    moment = tl.full([], 0.0, tl.float32)
    highest = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < V
        z = tl.load(logits_row + column, mask=inside, other=0.0).to(tl.float32)
        z = finish_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        if WITH_STATISTICS:
            highest = tl.where(tl.max(z, 0) > row_max, tl.argmax(z, 0) + start, highest)
        row_max, row_sum, moment = online_moment_update(row_max, row_sum, moment, z)

    target = tl.load(target_ptr + row).to(tl.int64)
    in_range = (target >= 0) & (target < V)
    ignored = target == IGNORED
    own = tl.load(logits_row + target, mask=in_range, other=0.0).to(tl.float32)
    own = finish_logits(own, target, in_range, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    log_sum = tl.log(row_sum)
    logp = tl.where(in_range, own - row_max - log_sum, float("nan"))
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, logp))
    if WITH_STATISTICS:
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_sum - moment / row_sum))
        tl.store(argmax_ptr + row, tl.where(ignored, -1, highest).to(tl.int64))

    if WITH_DLOGITS:
        # dlogits may be the logits' own memory: a tile is read whole before it is written.
        dlogits_row = dlogits_ptr + row * V
        inverse_sum = 1.0 / row_sum
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            inside = column < V
            z = tl.load(logits_row + column, mask=inside, other=0.0).to(tl.float32)
            z = finish_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
            dlogits = (tl.where(column == target, 1.0, 0.0) - tl.exp(z - row_max) * inverse_sum) * scale
            if HAS_SOFTCAP:
                dlogits *= 1.0 - (z / softcap) * (z / softcap)
            dlogits = tl.where(ignored, 0.0, dlogits)
            tl.store(dlogits_row + column, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def rows_from_logits(
    logits_nV: Tensor, target_n: Tensor, head: Head, dlogits_nV: Tensor | None, statistics: bool
) -> RowOutputs:
    """One launch over the fp32 logits of a chunk; see `head.Rows`."""
    num_rows, vocab = logits_nV.shape
    logp_n = torch.empty(num_rows, dtype=torch.float32, device=logits_nV.device)
    entropy_n = torch.empty_like(logp_n) if statistics else None
    argmax_n = torch.empty_like(logp_n, dtype=torch.int64) if statistics else None
    with torch.cuda.device_of(logits_nV):
        logprob_rows_kernel[(num_rows,)](
            logits_nV,
            head.bias_V,
            align(target_n),
            logp_n,
            entropy_n,
            argmax_n,
            dlogits_nV,
            vocab,
            head.softcap or 1.0,
            head.scale,
            IGNORED=IGNORED_TARGET,
            HAS_BIAS=head.bias_V is not None,
            HAS_SOFTCAP=head.softcap is not None,
            WITH_STATISTICS=statistics,
            WITH_DLOGITS=dlogits_nV is not None,
            BLOCK_V=block_v(vocab),
            num_warps=NUM_WARPS,
        )
    return RowOutputs(logp_n, entropy_n, argmax_n)


ROWS = Rows(rows_from_logits, fused_rows)


def without_gradient(dtype: torch.dtype) -> str:
    """What `auto` takes where nothing needs a gradient: exact fp32 products have no tensor cores to win by fusing."""
    return "fused" if dtype in HALVES else "store"


def or_empty(tensor: Tensor | None, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Operations return tensors only: an empty one stands for None."""
    return like.new_empty(shape or (0,), dtype=dtype) if tensor is None else tensor


@torch.library.custom_op("bpo_kernels::linear_logprob_fwd", mutates_args=())
def _forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    mode: str,
    step: int,
    keeps_hidden_grad: bool,
    keeps_dlogits: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy and argmax [N]; D @ W [N, H]; D [N, V]; empty where not asked for."""
    plan = HeadPlan(mode, step, keeps_hidden_grad, keeps_dlogits)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        outputs, unit_grad_NH, kept_NV = head_forward(
            ROWS, hidden_NH, weight_VH, target_N, Head(bias_V, softcap, scale), plan, statistics=statistics
        )
    return (
        outputs.logp_n,
        or_empty(outputs.entropy_n, outputs.logp_n),
        or_empty(outputs.argmax_n, target_N, dtype=torch.int64),
        or_empty(unit_grad_NH, hidden_NH, 0, 0),
        or_empty(kept_NV, hidden_NH, 0, weight_VH.shape[0]),
    )


@_forward.register_fake
def _(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    mode: str,
    step: int,
    keeps_hidden_grad: bool,
    keeps_dlogits: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = hidden_NH.shape[0]
    asked = num_rows if statistics else 0
    return (
        hidden_NH.new_empty(num_rows, dtype=torch.float32),
        hidden_NH.new_empty(asked, dtype=torch.float32),
        hidden_NH.new_empty(asked, dtype=torch.int64),
        hidden_NH.new_empty(hidden_NH.shape if keeps_hidden_grad else (0, 0)),
        hidden_NH.new_empty(num_rows if keeps_dlogits else 0, weight_VH.shape[0]),
    )


@torch.library.custom_op("bpo_kernels::linear_logprob_bwd", mutates_args=())
def _backward(
    grad_logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    kept_NV: Tensor,
    softcap: float | None,
    scale: float,
    step: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not needed."""
    head = Head(bias_V, softcap, scale)
    kept = kept_NV if kept_NV.shape[0] else None
    needs = (needs_hidden, needs_weight, needs_bias)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        grads = head_backward(ROWS, grad_logp_N, hidden_NH, weight_VH, target_N, head, step, None, kept, needs)
    bias_dtype = hidden_NH.dtype if bias_V is None else bias_V.dtype
    return (
        or_empty(grads[0], hidden_NH, 0, 0),
        or_empty(grads[1], weight_VH, 0, 0),
        or_empty(grads[2], hidden_NH, dtype=bias_dtype),
    )


@_backward.register_fake
def _(
    grad_logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    kept_NV: Tensor,
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_NH, weight_VH, target_N, bias_V, ctx.softcap, ctx.scale, _, ctx.step, ctx.keeps_hidden_grad = inputs[:9]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # The weight itself, never a view of it: ZeRO-3 gathers the parameter again before the backward.
    ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, *output[3:])


def _gradient(ctx: Any, grad_logp_N: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, kept_NV = ctx.saved_tensors
    unused = [None] * 7
    if grad_logp_N is None:
        return None, None, None, None, *unused
    if ctx.keeps_hidden_grad:
        return (unit_grad_NH * grad_logp_N[:, None]).to(hidden_NH.dtype), None, None, None, *unused
    hidden, weight, _, bias = ctx.needs_input_grad[:4]
    grad_hidden_NH, grad_weight_VH, grad_bias_V = _backward(
        grad_logp_N,
        hidden_NH,
        weight_VH,
        target_N,
        bias_V,
        kept_NV,
        ctx.softcap,
        ctx.scale,
        ctx.step,
        hidden,
        weight,
        bias,
    )
    grads = (grad_hidden_NH if hidden else None, grad_weight_VH if weight else None, None)
    return *grads, grad_bias_V if bias else None, *unused


_forward.register_autograd(_gradient, setup_context=_save)


def gemm_flops(hidden_shape: Sequence[int], vocab: int, gemms: int) -> int:
    """Multiplications and additions of so many products of [N, H] and [H, V]."""
    return gemms * 2 * hidden_shape[0] * hidden_shape[1] * vocab


# torch.utils.flop_counter does not look inside a custom operation.
@register_flop_formula(torch.ops.bpo_kernels.linear_logprob_fwd)
def _(hidden: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any = None, **_: Any) -> int:
    keeps_hidden_grad = others[6]
    return gemm_flops(hidden, weight[0], 1 + keeps_hidden_grad)


@register_flop_formula(torch.ops.bpo_kernels.linear_logprob_bwd)
def _(grad: Sequence[int], hidden: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any = None) -> int:
    _, _, kept, _, _, _, needs_hidden, needs_weight, _ = others
    return gemm_flops(hidden, weight[0], (kept[0] == 0) + needs_hidden + needs_weight)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    *,
    mode: str = "auto",
    budget_bytes: int | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, never the [N, V] logits of all rows; see `reference.linear_logprob`.

    On CUDA a target outside [0, V) is not looked for; its log-prob is NaN.
    """
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, mode, budget_bytes)
    check_triton_dtype("hidden_NH", hidden_NH)
    hidden_NH = autocast_hidden(hidden_NH)
    grad = torch.is_grad_enabled()
    needs_head = grad and (weight_VH.requires_grad or (bias is not None and bias.requires_grad))
    needs_hidden = grad and hidden_NH.requires_grad
    size, kind = (hidden_NH.shape[0], weight_VH.shape[0]), (hidden_NH.dtype, hidden_NH.device)
    plan = plan_head(mode, *size, *kind, needs_hidden, needs_head, budget_bytes, without_gradient(hidden_NH.dtype))
    logp_N, entropy_N, argmax_N, _, _ = _forward(
        hidden_NH,
        weight_VH,
        target_N.contiguous(),
        bias,
        softcap,
        scale,
        plan.mode,
        plan.step,
        plan.keeps_hidden_grad,
        plan.keeps_dlogits,
        statistics,
    )
    return (logp_N, entropy_N, argmax_N) if statistics else logp_N
