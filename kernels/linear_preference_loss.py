"""Head and preference loss of policy and reference in one autograd function, called by training.

Legend: N rows (response tokens), H hidden size, V vocabulary, P pairs.

Forward: log-probs of the policy's rows and, for a live reference, of its rows in the same GEMMs (D only for the
policy's); then the loss of each pair. Backward: the loss's coefficient of each token, then the head's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import preference_loss as pairs_module
from .checks import (
    autocast_hidden,
    check_linear_logprob,
    check_preference_loss,
    check_preference_options,
    check_reference,
    check_triton_dtype,
)
from .head import Head, HeadPlan, head_backward, head_forward, plan_head
from .linear_logprob import ROWS, gemm_flops, or_empty, without_gradient


@torch.library.custom_op("bpo_kernels::linear_preference_loss_fwd", mutates_args=())
def _forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    reference: Tensor,
    reference_weight_VH: Tensor | None,
    reference_bias_V: Tensor | None,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    pair_beta_P: Tensor | None,
    pair_weight_P: Tensor | None,
    softcap: float | None,
    scale: float,
    beta: float,
    label_smoothing: float,
    loss_type: str,
    mode: str,
    step: int,
    keeps_hidden_grad: bool,
    keeps_dlogits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, rewards of both sides [P]; log-probs [N]; derivatives by the margins [P]; D @ W [N, H]; D [N, V]."""
    plan = HeadPlan(mode, step, keeps_hidden_grad, keeps_dlogits)
    head, num_rows = Head(bias_V, softcap, scale), hidden_NH.shape[0]
    is_live = reference.dim() == 2
    stacked = is_live and reference_weight_VH is None
    with torch.autocast(hidden_NH.device.type, enabled=False):
        rows_MH = torch.cat([hidden_NH, reference]) if stacked else hidden_NH
        target_M = target_N.repeat(2) if stacked else target_N
        outputs, unit_grad_NH, kept_NV = head_forward(
            ROWS, rows_MH, weight_VH, target_M, head, plan, num_policy=num_rows
        )
        logp_N, reference_N = outputs.logp_n[:num_rows].contiguous(), outputs.logp_n[num_rows:]
        if not is_live:
            reference_N = reference
        elif reference_weight_VH is not None:
            other = Head(reference_bias_V, softcap, scale)
            forward_only = HeadPlan(mode, step, False, False)
            reference_N = head_forward(ROWS, reference, reference_weight_VH, target_N, other, forward_only)[0].logp_n
    losses_P, chosen_P, rejected_P, derivative_P = pairs_module.forward(
        logp_N,
        reference_N,
        completion_of_token_N,
        pairs_P2,
        token_weight_N,
        completion_starts_K1,
        pair_beta_P,
        pair_weight_P,
        beta,
        label_smoothing,
        loss_type,
    )
    kept = or_empty(unit_grad_NH, hidden_NH, 0, 0), or_empty(kept_NV, hidden_NH, 0, weight_VH.shape[0])
    return losses_P, chosen_P, rejected_P, logp_N, derivative_P, *kept


@_forward.register_fake
def _(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    reference: Tensor,
    reference_weight_VH: Tensor | None,
    reference_bias_V: Tensor | None,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    pair_beta_P: Tensor | None,
    pair_weight_P: Tensor | None,
    softcap: float | None,
    scale: float,
    beta: float,
    label_smoothing: float,
    loss_type: str,
    mode: str,
    step: int,
    keeps_hidden_grad: bool,
    keeps_dlogits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def row(size: int) -> Tensor:
        return hidden_NH.new_empty(size, dtype=torch.float32)

    num_rows, num_pairs = hidden_NH.shape[0], pairs_P2.shape[0]
    return (
        row(num_pairs),
        row(num_pairs),
        row(num_pairs),
        row(num_rows),
        row(num_pairs),
        hidden_NH.new_empty(hidden_NH.shape if keeps_hidden_grad else (0, 0)),
        hidden_NH.new_empty(num_rows if keeps_dlogits else 0, weight_VH.shape[0]),
    )


@torch.library.custom_op("bpo_kernels::linear_preference_loss_bwd", mutates_args=())
def _backward(
    grad_losses_P: Tensor | None,
    grad_logp_N: Tensor | None,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    logp_N: Tensor,
    derivative_P: Tensor,
    unit_grad_NH: Tensor,
    kept_NV: Tensor,
    softcap: float | None,
    scale: float,
    step: int,
    keeps_hidden_grad: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty if not needed."""
    if grad_losses_P is not None:
        batch = (completion_of_token_N, pairs_P2, token_weight_N, completion_starts_K1)
        coefficient_N = pairs_module.backward(grad_losses_P, derivative_P, logp_N, *batch)
        if grad_logp_N is not None:
            coefficient_N += grad_logp_N
    else:
        coefficient_N = grad_logp_N if grad_logp_N is not None else torch.zeros_like(logp_N)
    unit_grad = unit_grad_NH if keeps_hidden_grad else None
    kept = kept_NV if kept_NV.shape[0] else None
    needs = (needs_hidden, needs_weight, needs_bias)
    head = Head(bias_V, softcap, scale)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        grads = head_backward(ROWS, coefficient_N, hidden_NH, weight_VH, target_N, head, step, unit_grad, kept, needs)
    bias_dtype = hidden_NH.dtype if bias_V is None else bias_V.dtype
    return (
        or_empty(grads[0], hidden_NH, 0, 0),
        or_empty(grads[1], weight_VH, 0, 0),
        or_empty(grads[2], hidden_NH, dtype=bias_dtype),
    )


@_backward.register_fake
def _(
    grad_losses_P: Tensor | None,
    grad_logp_N: Tensor | None,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    logp_N: Tensor,
    derivative_P: Tensor,
    unit_grad_NH: Tensor,
    kept_NV: Tensor,
    softcap: float | None,
    scale: float,
    step: int,
    keeps_hidden_grad: bool,
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
    hidden_NH, weight_VH, target_N, bias_V = inputs[:4]
    batch = inputs[7:11]  # completions of the tokens, pairs, weights, offsets
    ctx.softcap, ctx.scale = inputs[13:15]
    ctx.step, ctx.keeps_hidden_grad = inputs[19:21]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2], *output[4:])
    # The weight itself, not a view: ZeRO-3 gathers the parameter again before the backward.
    ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, *batch, *output[3:])


def _gradient(ctx: Any, grad_losses_P: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    unused = [None] * 18
    grad_logp_N = others[2]
    if grad_losses_P is None and grad_logp_N is None:
        return None, None, None, None, *unused
    hidden, weight, _, bias = ctx.needs_input_grad[:4]
    grad_hidden_NH, grad_weight_VH, grad_bias_V = _backward(
        grad_losses_P,
        grad_logp_N,
        *ctx.saved_tensors,
        ctx.softcap,
        ctx.scale,
        ctx.step,
        ctx.keeps_hidden_grad,
        hidden,
        weight,
        bias,
    )
    grads = (grad_hidden_NH if hidden else None, grad_weight_VH if weight else None, None)
    return *grads, grad_bias_V if bias else None, *unused


_forward.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.bpo_kernels.linear_preference_loss_fwd)
def _(
    hidden: Sequence[int],
    weight: Sequence[int],
    target: Sequence[int],
    bias: Sequence[int] | None,
    reference: Sequence[int],
    *others: Any,
    out_shape: Any = None,
) -> int:
    keeps_hidden_grad, live = others[-2], len(reference) == 2
    return gemm_flops(hidden, weight[0], 1 + live + keeps_hidden_grad)


@register_flop_formula(torch.ops.bpo_kernels.linear_preference_loss_bwd)
def _(
    grad_losses: Sequence[int] | None,
    grad_logp: Sequence[int] | None,
    hidden: Sequence[int],
    weight: Sequence[int],
    *others: Any,
    out_shape: Any = None,
) -> int:
    kept, (keeps_hidden_grad, needs_hidden, needs_weight, _) = others[9], others[-4:]
    gemms = 0 if keeps_hidden_grad else (kept[0] == 0) + needs_hidden + needs_weight
    return gemm_flops(hidden, weight[0], gemms)


def _check_tokens(hidden_NH: Tensor, completion_of_token_N: Tensor, pairs_P2: Tensor, *others: Any) -> None:
    """`check_preference_loss` for log-probs that do not exist yet."""
    token_weight_N, num_completions, *optional = others
    if num_completions is None and hidden_NH.is_cuda:
        num_completions = 0  # used only in the index checks, which are skipped on CUDA
    logp_N = hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32)
    check_preference_loss(logp_N, logp_N, completion_of_token_N, pairs_P2, token_weight_N, num_completions, *optional)


def linear_preference_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    reference: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    beta: float,
    *,
    reference_weight_VH: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    token_weight_N: Tensor | None = None,
    completion_starts_K1: Tensor | None = None,
    num_completions: int | None = None,
    pair_beta_P: Tensor | None = None,
    pair_weight_P: Tensor | None = None,
    mode: str = "auto",
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and rewards [P] of the pairs and the policy's log-probs [N]; see `plain.linear_preference_loss`."""
    check_preference_options(beta, label_smoothing, loss_type)
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, mode, budget_bytes)
    check_reference(reference, reference_weight_VH, reference_bias, hidden_NH, weight_VH)
    check_triton_dtype("hidden_NH", hidden_NH)
    optional = (token_weight_N, num_completions, completion_starts_K1, pair_beta_P, pair_weight_P)
    _check_tokens(hidden_NH, completion_of_token_N, pairs_P2, *optional)
    hidden_NH = autocast_hidden(hidden_NH)
    num_rows, is_live = hidden_NH.shape[0], reference.dim() == 2
    grad = torch.is_grad_enabled()
    needs_head = grad and (weight_VH.requires_grad or (bias is not None and bias.requires_grad))
    stacked_rows = 2 * num_rows if is_live and reference_weight_VH is None else num_rows
    head = (weight_VH.shape[0], hidden_NH.dtype, hidden_NH.device, grad and hidden_NH.requires_grad, needs_head)
    options = (budget_bytes, without_gradient(hidden_NH.dtype), num_rows)
    plan = plan_head(mode, stacked_rows, *head, *options)
    constant = pairs_module.constant
    factors = (constant(pair_beta_P), constant(pair_weight_P))
    pairs = (completion_of_token_N, pairs_P2, constant(token_weight_N), completion_starts_K1, *factors)
    losses_P, chosen_P, rejected_P, logp_N, *_ = _forward(
        hidden_NH,
        weight_VH,
        target_N.contiguous(),
        bias,
        reference.detach().to(hidden_NH.dtype) if is_live else reference.detach(),
        constant(reference_weight_VH),
        constant(reference_bias),
        *pairs,
        softcap,
        scale,
        *(beta, label_smoothing, loss_type),
        *(plan.mode, plan.step, plan.keeps_hidden_grad, plan.keeps_dlogits),
    )
    return losses_P, chosen_P, rejected_P, logp_N
