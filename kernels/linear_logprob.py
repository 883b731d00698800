"""Log-probs of the targets from hidden states: the vendor's GEMM per chunk of rows, and one Triton kernel per chunk.

Legend: N rows (response tokens), H hidden size, V vocabulary.

The kernel (logprob_rows.py) reads the fp32 logits of a chunk and writes log-probs and, if a gradient is needed,
D = onehot - softmax (times the slopes of cap and scale), which is all that the backward needs. Chunks, modes and GEMMs
are in head.py, the pass without logits in fused_logprob.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import HALVES, autocast_hidden, check_linear_logprob, check_triton_dtype
from .fused_logprob import fused_rows
from .head import Head, HeadPlan, Rows, head_backward, head_forward, plan_head
from .logprob_rows import rows_from_logits

ROWS = Rows(rows_from_logits, fused_rows)


def without_gradient(dtype: torch.dtype) -> str:
    """Mode of `auto` if nothing needs a gradient: fusing does not pay for exact fp32 products, without tensor cores."""
    return "fused" if dtype in HALVES else "store"


def or_empty(tensor: Tensor | None, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor`, or an empty tensor for None: custom operations return only tensors."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, argmax and collision [N]; D @ W [N, H]; D [N, V]; empty if not requested."""
    plan = HeadPlan(mode, step, keeps_hidden_grad, keeps_dlogits)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        outputs, unit_grad_NH, kept_NV = head_forward(
            ROWS, hidden_NH, weight_VH, target_N, Head(bias_V, softcap, scale), plan, statistics=statistics
        )
    return (
        outputs.logp_n,
        or_empty(outputs.entropy_n, outputs.logp_n),
        or_empty(outputs.argmax_n, target_N, dtype=torch.int64),
        or_empty(outputs.collision_n, outputs.logp_n),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = hidden_NH.shape[0]
    asked = num_rows if statistics else 0
    return (
        hidden_NH.new_empty(num_rows, dtype=torch.float32),
        hidden_NH.new_empty(asked, dtype=torch.float32),
        hidden_NH.new_empty(asked, dtype=torch.int64),
        hidden_NH.new_empty(asked, dtype=torch.float32),
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
    """Gradients of hidden states, weight and bias; empty if not needed."""
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
    # The weight itself, not a view: ZeRO-3 gathers the parameter again before the backward.
    ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, *output[4:])


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
    """Multiplications and additions of `gemms` products of [N, H] and [H, V]."""
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
) -> Tensor | tuple[Tensor, ...]:
    """Log-probs of the targets, without the [N, V] logits of all rows; see `plain.linear_logprob`.

    On CUDA targets are not range-checked; the log-prob of one outside [0, V) is NaN.
    """
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, mode, budget_bytes)
    check_triton_dtype("hidden_NH", hidden_NH)
    hidden_NH = autocast_hidden(hidden_NH)
    grad = torch.is_grad_enabled()
    needs_head = grad and (weight_VH.requires_grad or (bias is not None and bias.requires_grad))
    needs_hidden = grad and hidden_NH.requires_grad
    size, kind = (hidden_NH.shape[0], weight_VH.shape[0]), (hidden_NH.dtype, hidden_NH.device)
    plan = plan_head(mode, *size, *kind, needs_hidden, needs_head, budget_bytes, without_gradient(hidden_NH.dtype))
    logp_N, *of_rows, _, _ = _forward(
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
    return (logp_N, *of_rows) if statistics else logp_N
