"""Log-probs of the LM head in plain PyTorch: the counterpart of linear_logprob.py and fused_logprob.py.

Legend: N rows (response tokens), n rows of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import IGNORED_TARGET, autocast_hidden, check_linear_logprob, statistics_dtype
from .head import Head, HeadPlan, RowOutputs, Rows, head_backward, head_forward, logits_fp32, plan_head

# Columns of the vocabulary per tile of the fused pass.
_FUSED_TILE_V = 4096


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
) -> Any:
    """Log-probs of the targets from hidden states, without the [N, V] logits of all rows.

    Equals `z = scale * F.linear(hidden, weight, bias).float()`, with `z = softcap * tanh(z / softcap)` if a
    cap is set, then `log_softmax(z, -1).gather(1, target[:, None])[:, 0]`, but without rounding the logits to half
    precision.

    Args:
        hidden_NH: [N, H] final hidden states of the response rows only.
        weight_VH: [V, H] as `nn.Linear` stores it. If it is frozen, its gradient is not computed.
        target_N: [N] int64 or int32 token ids; -100 masks a row: log-prob 0, no gradient.
        bias: [V] or None.
        softcap: positive cap on the logits (Gemma 2), or None.
        scale: factor on the logits before the cap (Cohere, Granite).
        mode: `store` saves what the backward needs, `recompute` saves nothing, `fused` has no logits in the forward and
            saves nothing, `auto` selects by the gradients needed and the budget; see `head.plan_head`.
        budget_bytes: maximum bytes of logits and their derivative at a time; None for the device's default.
        statistics: also return the entropy of each row's distribution, its most likely token and the logarithm of its
            collision probability, `log sum_v p_v^2` (needed by WPO, arXiv 2406.11827).

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 inputs); with `statistics` also the entropies [N] in nats, the argmax
        [N] int64 and the collisions [N] in nats (0, -1 and 0 for masked rows), without gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match, an option is unknown, or a target is outside [0, V).
    """
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, mode, budget_bytes)
    hidden_NH = autocast_hidden(hidden_NH)
    grad = torch.is_grad_enabled()
    needs_hidden, needs_weight, needs_bias = (
        grad and tensor is not None and tensor.requires_grad for tensor in (hidden_NH, weight_VH, bias)
    )
    size, kind = (hidden_NH.shape[0], weight_VH.shape[0]), (hidden_NH.dtype, hidden_NH.device)
    # Without a gradient, a vendor GEMM over whole rows is faster on a CPU than tiles, and as exact.
    plan = plan_head(mode, *size, *kind, needs_hidden, needs_weight or needs_bias, budget_bytes, "store")
    outputs = _LinearLogprob.apply(
        hidden_NH, weight_VH, target_N.long(), bias, softcap, scale, plan, budget_bytes, statistics
    )
    return outputs if statistics else outputs[0]


class _LinearLogprob(torch.autograd.Function):
    """`head.head_forward` and `head.head_backward` over plain PyTorch rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
        plan: HeadPlan,
        budget_bytes: int | None,
        statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        head = Head(bias_V, softcap, scale)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            outputs, unit_grad_NH, kept_NV = head_forward(
                ROWS, hidden_NH, weight_VH, target_N, head, plan, statistics=statistics, budget_bytes=budget_bytes
            )
        # The weight itself, not a view: ZeRO-3 gathers the parameter again before the backward.
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, kept_NV)
        ctx.softcap, ctx.scale, ctx.step = softcap, scale, plan.step
        if statistics:
            ctx.mark_non_differentiable(outputs.entropy_n, outputs.argmax_n, outputs.collision_n)
        return outputs.logp_n, outputs.entropy_n, outputs.argmax_n, outputs.collision_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, kept_NV = ctx.saved_tensors
        head = Head(bias_V, ctx.softcap, ctx.scale)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        with torch.autocast(hidden_NH.device.type, enabled=False):
            grad_hidden_NH, grad_weight_VH, grad_bias_V = head_backward(
                ROWS, grad_logp_N, hidden_NH, weight_VH, target_N, head, ctx.step, unit_grad_NH, kept_NV, needs
            )
        return grad_hidden_NH, grad_weight_VH, None, grad_bias_V, *[None] * 5


def _finish_logits(logits_nV: Tensor, head: Head, bias_V: Tensor | None) -> None:
    """Applies bias, scale and cap in place."""
    if bias_V is not None:
        logits_nV += bias_V
    if head.scale != 1.0:
        logits_nV *= head.scale
    if head.softcap is not None:
        logits_nV.div_(head.softcap).tanh_().mul_(head.softcap)


def _from_logits(
    logits_nV: Tensor, target_n: Tensor, head: Head, dlogits_nV: Tensor | None, dtype: torch.dtype, statistics: bool
) -> RowOutputs:
    _finish_logits(logits_nV, head, head.bias_V)
    slope_nV = None
    if head.softcap is not None and dlogits_nV is not None:
        slope_nV = 1 - (logits_nV / head.softcap).square_()
    counted_n1 = (target_n != IGNORED_TARGET)[:, None]
    index_n1 = target_n.clamp(min=0)[:, None]
    argmax_n = entropy_n = collision_n = None
    if statistics:
        max_n1, argmax_n1 = logits_nV.max(dim=1, keepdim=True)
        argmax_n = argmax_n1.masked_fill(~counted_n1, -1)[:, 0]
    else:
        max_n1 = logits_nV.amax(dim=1, keepdim=True)
    logits_nV -= max_n1
    target_logit_n1 = logits_nV.gather(1, index_n1)
    # A logit of -inf adds nothing to the entropy, but 0 * -inf would be NaN.
    shifted_nV = logits_nV.clamp(min=-1e30) if statistics else None
    sum_n1 = logits_nV.exp_().sum(dim=1, keepdim=True)
    log_sum_n1 = sum_n1.log()
    logp_n = (target_logit_n1 - log_sum_n1).masked_fill(~counted_n1, 0.0)[:, 0]
    if shifted_nV is not None:
        moment_n1 = shifted_nV.mul_(logits_nV).sum(dim=1, keepdim=True)
        entropy_n = (log_sum_n1 - moment_n1 / sum_n1).masked_fill(~counted_n1, 0.0)[:, 0]
        square_n1 = shifted_nV.copy_(logits_nV).square_().sum(dim=1, keepdim=True)
        collision_n = (square_n1.log() - 2 * log_sum_n1).masked_fill(~counted_n1, 0.0)[:, 0]
    if dlogits_nV is not None:
        # Division by infinity zeroes a masked row.
        logits_nV /= sum_n1.neg().masked_fill(~counted_n1, -float("inf"))
        logits_nV.scatter_add_(1, index_n1, counted_n1.to(logits_nV.dtype))
        if slope_nV is not None:
            logits_nV *= slope_nV
        if head.scale != 1.0:
            logits_nV *= head.scale
        if dlogits_nV is not logits_nV:
            dlogits_nV.copy_(logits_nV)
    return RowOutputs(logp_n, entropy_n, argmax_n, collision_n)


def _fused(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, head: Head, statistics: bool, budget_bytes: int
) -> RowOutputs:
    """Online maximum, sums and moment over tiles of the vocabulary, without the logits of a whole row."""
    num_rows, vocab = hidden_NH.shape[0], weight_VH.shape[0]
    dtype = statistics_dtype(hidden_NH.dtype)
    tile = max(1, min(_FUSED_TILE_V, budget_bytes // (max(1, num_rows) * dtype.itemsize)))
    row_max, row_sum, square, moment, target_logit = torch.zeros(5, num_rows, 1, dtype=dtype, device=hidden_NH.device)
    row_max -= float("inf")
    highest_N1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=hidden_NH.device)
    index_N1 = target_N.clamp(min=0)[:, None]
    for start in range(0, vocab, tile):
        columns = slice(start, min(start + tile, vocab))
        z = logits_fp32(hidden_NH, weight_VH[columns])
        _finish_logits(z, head, None if head.bias_V is None else head.bias_V[columns])
        inside_N1 = (index_N1 >= start) & (index_N1 < columns.stop)
        own_N1 = z.gather(1, (index_N1 - start).clamp(0, z.shape[1] - 1))
        target_logit = torch.where(inside_N1, own_N1, target_logit)
        tile_max, tile_argmax = z.max(dim=1, keepdim=True)
        highest_N1 = torch.where(tile_max > row_max, tile_argmax + start, highest_N1)
        new_max = torch.maximum(row_max, tile_max)
        # If all logits so far are -inf, there is nothing to rescale and no finite maximum to subtract.
        anchor = new_max.masked_fill(new_max == -float("inf"), 0.0)
        shift = (row_max - anchor).masked_fill(row_max == -float("inf"), 0.0)
        z -= anchor
        if statistics:
            moment = shift.exp() * (moment + shift * row_sum) + (z.exp() * z.clamp(min=-1e30)).sum(1, keepdim=True)
        row_sum = shift.exp() * row_sum + z.exp_().sum(dim=1, keepdim=True)
        if statistics:
            square = (2 * shift).exp() * square + z.square_().sum(dim=1, keepdim=True)
        row_max = new_max
        del z  # before the next tile is computed
    ignored_N1 = (target_N == IGNORED_TARGET)[:, None]
    logp_N = (target_logit - row_max - row_sum.log()).masked_fill(ignored_N1, 0.0)[:, 0]
    if not statistics:
        return RowOutputs(logp_N)
    entropy_N = (row_sum.log() - moment / row_sum).masked_fill(ignored_N1, 0.0)[:, 0]
    collision_N = (square.log() - 2 * row_sum.log()).masked_fill(ignored_N1, 0.0)[:, 0]
    return RowOutputs(logp_N, entropy_N, highest_N1.masked_fill(ignored_N1, -1)[:, 0], collision_N)


ROWS = Rows(_from_logits, _fused)
