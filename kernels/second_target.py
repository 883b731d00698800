"""Log-prob of a second target at the same hidden state: two rows of the weight per row instead of a GEMM with all.

Legend: N rows (response tokens), H hidden size, V vocabulary.

Forward and backward are one launch each over N rows: they read the hidden states and two gathered rows of the weight,
about `3 N H` entries, which bounds their time. Only a trained head adds launches of PyTorch, for its own gradient.
"""

# Parameters of Triton kernels are pointers and constants of its language.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import IGNORED_TARGET, align, autocast_hidden, check_second_target, check_triton_dtype
from .fused_logprob import finish_logits
from .linear_logprob import or_empty
from .plain_second import scattered

# Two rows of 512 entries: each thread reads 16 bytes of a half-precision row at a time.
BLOCK_N, BLOCK_H, NUM_WARPS = 2, 512, 4


@triton.jit
def targets_of_rows(target_ptr, second_ptr, row, N, V, IGNORED: tl.constexpr):
    """Both targets of each row; whether it is masked; whether both are valid; whether its logits are computed."""
    target = tl.load(target_ptr + row, mask=row < N, other=IGNORED).to(tl.int64)
    second = tl.load(second_ptr + row, mask=row < N, other=IGNORED).to(tl.int64)
    masked = (target == IGNORED) | (second == IGNORED)
    valid = (target >= 0) & (target < V) & (second >= 0) & (second < V)
    return target, second, masked, valid, valid & (target != second)


@triton.jit
def weight_tile(weight_ptr, token, h, inside, H, like_ptr):
    """[BLOCK_N, BLOCK_H] entries of the tokens' rows, rounded to the dtype of the head's products; in fp32."""
    entries = tl.load(weight_ptr + token[:, None] * H + h[None, :], mask=inside, other=0.0)
    return entries.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def slope_of(z, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """Derivative of a finished logit with respect to `hidden @ weight.T + bias`."""
    if HAS_SOFTCAP:
        return scale * (1.0 - (z / softcap) * (z / softcap))
    else:
        return z * 0.0 + scale


@triton.jit
def second_target_fwd_kernel(
    logp_ptr,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    second_ptr,
    result_ptr,
    slopes_ptr,
    N,
    V,
    H,
    softcap,
    scale,
    IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target, second, masked, valid, computed = targets_of_rows(target_ptr, second_ptr, row, N, V, IGNORED)
    first_sum = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    second_sum = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = computed[:, None] & (h < H)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
        first_sum += x * weight_tile(weight_ptr, target, h, inside, H, hidden_ptr)
        second_sum += x * weight_tile(weight_ptr, second, h, inside, H, hidden_ptr)
    z = tl.sum(first_sum, 1)
    z = finish_logits(z, target, computed, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    second_z = tl.sum(second_sum, 1)
    second_z = finish_logits(second_z, second, computed, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    logp = tl.load(logp_ptr + row, mask=row < N, other=0.0)
    # The same token keeps its log-prob to the bit: a sum would turn -0.0 into 0.0, and infinite logits into NaN.
    result = tl.where(computed, logp + (second_z - z), tl.where(target == second, logp, float("nan")))
    tl.store(result_ptr + row, tl.where(masked, 0.0, result), mask=row < N)
    slope = tl.where(computed, slope_of(z, softcap, scale, HAS_SOFTCAP), 0.0)
    second_slope = tl.where(computed, slope_of(second_z, softcap, scale, HAS_SOFTCAP), 0.0)
    tl.store(slopes_ptr + row, slope, mask=row < N)
    tl.store(slopes_ptr + N + row, second_slope, mask=row < N)


@triton.jit
def second_target_bwd_kernel(
    grad_ptr,
    grad_stride,
    weight_ptr,
    target_ptr,
    second_ptr,
    slopes_ptr,
    grad_logp_ptr,
    grad_hidden_ptr,
    N,
    V,
    H,
    IGNORED: tl.constexpr,
    NEEDS_HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target, second, masked, valid, computed = targets_of_rows(target_ptr, second_ptr, row, N, V, IGNORED)
    grad = tl.load(grad_ptr + row * grad_stride, mask=row < N, other=0.0)
    tl.store(grad_logp_ptr + row, tl.where(masked, 0.0, grad), mask=row < N)
    if NEEDS_HIDDEN:
        # Rows without a derivative read no weight; their product would be NaN for a gradient that is not finite.
        coefficient = grad * tl.load(slopes_ptr + row, mask=computed, other=0.0)
        second_coefficient = grad * tl.load(slopes_ptr + N + row, mask=computed, other=0.0)
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            inside = computed[:, None] & (h < H)[None, :]
            value = second_coefficient[:, None] * weight_tile(weight_ptr, second, h, inside, H, grad_hidden_ptr)
            value -= coefficient[:, None] * weight_tile(weight_ptr, target, h, inside, H, grad_hidden_ptr)
            value = tl.where(inside, value, 0.0).to(grad_hidden_ptr.dtype.element_ty)
            exists = (row < N)[:, None] & (h < H)[None, :]
            tl.store(grad_hidden_ptr + row[:, None] * H + h[None, :], value, mask=exists)


@torch.library.custom_op("bpo_kernels::second_target_fwd", mutates_args=())
def _forward(
    logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the second targets [N]; derivatives of both logits by `hidden @ weight.T + bias` [2, N], fp32."""
    num_rows, hidden_size = hidden_NH.shape
    result_N, slopes_2N = torch.empty_like(logp_N), logp_N.new_empty(2, num_rows)
    if num_rows == 0:
        return result_N, slopes_2N
    with torch.cuda.device_of(hidden_NH):
        second_target_fwd_kernel[(triton.cdiv(num_rows, BLOCK_N),)](
            logp_N.contiguous(),
            hidden_NH.contiguous(),
            weight_VH.contiguous(),
            bias_V,
            align(target_N),
            align(second_N),
            result_N,
            slopes_2N,
            num_rows,
            weight_VH.shape[0],
            hidden_size,
            softcap or 1.0,
            scale,
            IGNORED=IGNORED_TARGET,
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_N=BLOCK_N,
            BLOCK_H=BLOCK_H,
            num_warps=NUM_WARPS,
        )
    return result_N, slopes_2N


@_forward.register_fake
def _(
    logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logp_N), logp_N.new_empty(2, logp_N.shape[0])


@torch.library.custom_op("bpo_kernels::second_target_bwd", mutates_args=())
def _backward(
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    bias_V: Tensor | None,
    slopes_2N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log-probs, hidden states, weight and bias; empty if not needed (log-probs: always)."""
    (num_rows, hidden_size), vocab = hidden_NH.shape, weight_VH.shape[0]
    grad_logp_N = torch.empty(num_rows, dtype=grad_N.dtype, device=grad_N.device)
    grad_hidden_NH = hidden_NH.new_empty(num_rows, hidden_size) if needs_hidden else None
    if num_rows:
        with torch.cuda.device_of(hidden_NH):
            second_target_bwd_kernel[(triton.cdiv(num_rows, BLOCK_N),)](
                grad_N,
                grad_N.stride(0),
                weight_VH.contiguous(),
                align(target_N),
                align(second_N),
                slopes_2N,
                grad_logp_N,
                grad_hidden_NH,
                num_rows,
                vocab,
                hidden_size,
                IGNORED=IGNORED_TARGET,
                NEEDS_HIDDEN=needs_hidden,
                BLOCK_N=BLOCK_N,
                BLOCK_H=BLOCK_H,
                num_warps=NUM_WARPS,
            )
    grad_weight_VH = grad_bias_V = None
    if needs_weight or needs_bias:
        # A slope of 0 marks a row without a derivative, whatever its gradient; a cap's slope of 0 gives 0 either way.
        coefficients_2N = (grad_N * slopes_2N).masked_fill(slopes_2N == 0, 0.0)
        targets = (target_N, second_N, -coefficients_2N[0], coefficients_2N[1])
        grad_weight_VH = scattered(weight_VH, *targets, hidden_NH) if needs_weight else None
        grad_bias_V = scattered(bias_V, *targets) if needs_bias and bias_V is not None else None
    bias_dtype = hidden_NH.dtype if bias_V is None else bias_V.dtype
    return (
        grad_logp_N,
        or_empty(grad_hidden_NH, hidden_NH, 0, 0),
        or_empty(grad_weight_VH, weight_VH, 0, 0),
        or_empty(grad_bias_V, hidden_NH, dtype=bias_dtype),
    )


@_backward.register_fake
def _(
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    bias_V: Tensor | None,
    slopes_2N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_dtype = hidden_NH.dtype if bias_V is None else bias_V.dtype
    return (
        grad_N.new_empty(grad_N.shape),
        hidden_NH.new_empty(hidden_NH.shape if needs_hidden else (0, 0)),
        weight_VH.new_empty(weight_VH.shape if needs_weight else (0, 0)),
        hidden_NH.new_empty(weight_VH.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    # The weight itself, not a view: ZeRO-3 gathers the parameter again before the backward.
    ctx.save_for_backward(*inputs[1:6], output[1])


def _gradient(ctx: Any, grad_N: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    unused = (None, None)
    if grad_N is None:
        return (None,) * 8
    logp, hidden, weight, *_others, bias = ctx.needs_input_grad[:6]
    grads = _backward(grad_N, *ctx.saved_tensors, hidden, weight, bias)
    of_logp, of_hidden, of_weight, of_bias = (
        grad if needed else None for grad, needed in zip(grads, (logp, hidden, weight, bias), strict=True)
    )
    return of_logp, of_hidden, of_weight, *unused, of_bias, *unused


_forward.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.bpo_kernels.second_target_fwd)
def _(logp: Sequence[int], hidden: Sequence[int], *others: Any, out_shape: Any = None) -> int:
    """Two products of each row."""
    return 4 * hidden[0] * hidden[1]


@register_flop_formula(torch.ops.bpo_kernels.second_target_bwd)
def _(grad: Sequence[int], hidden: Sequence[int], *others: Any, out_shape: Any = None) -> int:
    """Two scaled rows, for the hidden states and for the weight."""
    needs_hidden, needs_weight, _ = others[-3:]
    return 4 * hidden[0] * hidden[1] * (needs_hidden + needs_weight)


def second_target_logprob(
    logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Log-probs [N] of the second targets; see `plain_second.second_target_logprob`.

    On CUDA targets are not range-checked; the log-prob is NaN if one of them is outside [0, V).
    """
    check_second_target(logp_N, hidden_NH, weight_VH, target_N, second_N, bias, softcap)
    check_triton_dtype("hidden_NH", hidden_NH)
    hidden_NH = autocast_hidden(hidden_NH)
    targets = (target_N.contiguous(), second_N.contiguous())
    return _forward(logp_N, hidden_NH, weight_VH, *targets, bias, softcap, scale)[0]
