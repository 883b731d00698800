"""Log-prob of a second target at the same hidden state in plain PyTorch: the counterpart of second_target.py.

Legend: N rows (response tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import IGNORED_TARGET, autocast_hidden, check_second_target, statistics_dtype


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
    """Log-prob of another token than the target at each row, without a second product with the whole head.

    Two log-probs of one distribution differ by their logits: `logp_second = logp_target + z(second) - z(target)`, each
    logit the product of the hidden state with one row of the weight. It equals
    `linear_logprob(hidden, weight, second, bias, softcap, scale)` up to rounding, gradients included, if `logp_N` is
    `linear_logprob(hidden, weight, target, bias, softcap, scale)` with its graph.

    Args:
        logp_N: [N] log-probs of `target_N`, as returned by `linear_logprob` for these rows and options.
        hidden_NH: [N, H] hidden states of the rows.
        weight_VH: [V, H] as `nn.Linear` stores it. If it is frozen, its gradient is not computed; if not, the gradient
            is dense and summed in fp32, 4 V H bytes.
        target_N: [N] int64 or int32 token ids of `logp_N`.
        second_N: [N] int64 or int32 other token ids. -100 in either masks a row: log-prob 0, no gradient.
        bias: [V] or None.
        softcap: positive cap on the logits, or None.
        scale: factor on the logits before the cap.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 inputs). If both targets are the same token, exactly `logp_N`, and no other
        gradient than that of `logp_N`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a target is outside [0, V).
    """
    check_second_target(logp_N, hidden_NH, weight_VH, target_N, second_N, bias, softcap)
    hidden_NH = autocast_hidden(hidden_NH)
    return _SecondTarget.apply(logp_N, hidden_NH, weight_VH, target_N.long(), second_N.long(), bias, softcap, scale)


class _SecondTarget(torch.autograd.Function):
    """Saves the derivatives of both logits with respect to `hidden @ weight.T + bias`: 8 bytes per row."""

    @staticmethod
    def forward(
        ctx: Any,
        logp_N: Tensor,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        second_N: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            z_N, slope_N = _logit(hidden_NH, weight_VH, target_N, bias_V, softcap, scale)
            second_z_N, second_slope_N = _logit(hidden_NH, weight_VH, second_N, bias_V, softcap, scale)
        same_N = target_N == second_N
        # The weight itself, not a view: ZeRO-3 gathers the parameter again before the backward.
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, second_N, bias_V, slope_N, second_slope_N)
        # A sum would turn -0.0 into 0.0, and infinite logits into NaN.
        return torch.where(same_N, logp_N, logp_N + (second_z_N - z_N)).masked_fill(_masked(target_N, second_N), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, second_N, bias_V, slope_N, second_slope_N = ctx.saved_tensors
        needs_logp, needs_hidden, needs_weight, _, _, needs_bias = ctx.needs_input_grad[:6]
        grad_N = grad_N.masked_fill(_masked(target_N, second_N), 0.0)
        moved_N = grad_N.masked_fill(target_N == second_N, 0.0)
        coefficient_N, second_coefficient_N = -moved_N * slope_N, moved_N * second_slope_N
        targets = (target_N, second_N, coefficient_N, second_coefficient_N)
        grad_hidden_NH = grad_weight_VH = grad_bias_V = None
        if needs_hidden:
            grad_hidden_NH = coefficient_N[:, None] * _weight_rows(weight_VH, target_N, hidden_NH.dtype)
            grad_hidden_NH += second_coefficient_N[:, None] * _weight_rows(weight_VH, second_N, hidden_NH.dtype)
            grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        if needs_weight:
            grad_weight_VH = scattered(weight_VH, *targets, hidden_NH)
        if needs_bias:
            grad_bias_V = scattered(bias_V, *targets)
        return grad_N if needs_logp else None, grad_hidden_NH, grad_weight_VH, None, None, grad_bias_V, None, None


def _masked(target_N: Tensor, second_N: Tensor) -> Tensor:
    return (target_N == IGNORED_TARGET) | (second_N == IGNORED_TARGET)


def _weight_rows(weight_VH: Tensor, index_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [N, H] of the weight, rounded to the dtype of the head's products and converted to that of log-probs."""
    return weight_VH[index_N.clamp(min=0)].to(dtype).to(statistics_dtype(dtype))


def _logit(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    index_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Logit [N] of one token per row, and its derivative [N] with respect to the logit before scale and cap."""
    rows_NH = _weight_rows(weight_VH, index_N, hidden_NH.dtype)
    z_N = (hidden_NH.to(rows_NH.dtype) * rows_NH).sum(dim=1)
    if bias_V is not None:
        z_N += bias_V[index_N.clamp(min=0)]
    z_N *= scale
    slope_N = torch.full_like(z_N, scale)
    if softcap is not None:
        z_N = softcap * torch.tanh(z_N / softcap)
        slope_N *= 1 - (z_N / softcap).square()
    return z_N, slope_N


def scattered(
    like: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    coefficient_N: Tensor,
    second_coefficient_N: Tensor,
    hidden_NH: Tensor | None = None,
) -> Tensor:
    """Sum of the coefficients of each token, times its rows' hidden states if given, as `like` [V] or [V, H].

    Summed in fp32 whatever the dtype of `like`, in a fixed order: on CUDA, `index_put_` sorts the indices, where
    `index_add_` adds atomically.
    """
    total = torch.zeros(like.shape, dtype=coefficient_N.dtype, device=like.device)
    for index_N, values in ((target_N, coefficient_N), (second_N, second_coefficient_N)):
        if hidden_NH is not None:
            values = values[:, None] * hidden_NH.to(values.dtype)
        index_N = index_N.long().clamp(min=0, max=like.shape[0] - 1)
        if total.is_cuda:
            total.index_put_((index_N,), values, accumulate=True)
        else:
            total.index_add_(0, index_N, values)
    return total.to(like.dtype)
