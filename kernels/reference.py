"""Every operation in plain PyTorch: the twin of the Triton kernels, and the path that training takes on a CPU.

Legend: N rows (response tokens), n rows of one chunk, H hidden size, V vocabulary, K completions, P pairs.

The derivatives, the chunking and the numerical choices are explained in README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    autocast_hidden,
    check_linear_logprob,
    check_logprob_gather,
    check_preference_loss,
    check_preference_options,
    mm_fp32,
    rows_per_chunk,
    statistics_dtype,
)

# A half-precision weight is turned to fp32 in tiles of this many bytes, never as a whole.
_WEIGHT_TILE_BYTES = 16 << 20
# logprob_gather goes over its logits in pieces that stay in a CPU's cache: several passes cost little more than one.
_GATHER_CHUNK_BYTES = 2 << 20


def logprob_gather(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """`log_softmax(logits.float(), -1).gather(1, target[:, None])[:, 0]`, differentiable in the logits.

    Args:
        logits_NV: [N, V] in any float type and layout.
        target_N: [N] int64 or int32 token ids.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target lies outside [0, V).
    """
    check_logprob_gather(logits_NV, target_N)
    return _LogprobGather.apply(logits_NV, target_N.long())


class _LogprobGather(torch.autograd.Function):
    """Keeps maximum and log-sum per row: their sum would lose the probabilities' digits at logits in the thousands."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        num_rows = logits_NV.shape[0]
        dtype = statistics_dtype(logits_NV.dtype)
        max_N1, log_sum_N1 = torch.empty(2, num_rows, 1, dtype=dtype, device=logits_NV.device)
        step = _gather_step(logits_NV)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            logits_nV = logits_NV[rows].to(dtype)
            max_N1[rows] = logits_nV.amax(dim=1, keepdim=True)
            log_sum_N1[rows] = (logits_nV - max_N1[rows]).exp_().sum(dim=1, keepdim=True).log()
        ctx.save_for_backward(logits_NV, target_N, max_N1, log_sum_N1)
        target_logit_N1 = logits_NV.gather(1, target_N[:, None]).to(dtype)
        return (target_logit_N1 - max_N1 - log_sum_N1)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, target_N, max_N1, log_sum_N1 = ctx.saved_tensors
        grad_logits_NV = torch.empty_like(logits_NV)
        num_rows, step = logits_NV.shape[0], _gather_step(logits_NV)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            dlogits_nV = (logits_NV[rows].to(max_N1.dtype) - max_N1[rows]).sub_(log_sum_N1[rows]).exp_().neg_()
            dlogits_nV.scatter_add_(1, target_N[rows, None], torch.ones_like(max_N1[rows]))
            grad_logits_NV[rows] = dlogits_nV.mul_(grad_logp_N[rows, None])
        return grad_logits_NV, None


def _gather_step(logits_NV: Tensor) -> int:
    budget_bytes = None if logits_NV.is_cuda else _GATHER_CHUNK_BYTES
    itemsize = statistics_dtype(logits_NV.dtype).itemsize
    return rows_per_chunk(*logits_NV.shape, itemsize, budget_bytes, logits_NV.device)


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
    """Log-probs of the targets from hidden states, without the [N, V] logits of all rows.

    Equals `z = scale * F.linear(hidden, weight, bias).float()`, with `z = softcap * tanh(z / softcap)` where a
    cap is set, then `log_softmax(z, -1).gather(1, target[:, None])[:, 0]`; but the logits never are rounded to
    half precision.

    Args:
        hidden_NH: [N, H] final hidden states of the response rows only.
        weight_VH: [V, H] as `nn.Linear` holds it. Where it is frozen, its gradient is never computed.
        target_N: [N] int64 or int32 token ids.
        bias: [V] or None.
        softcap: positive cap on the logits (Gemma 2), or None.
        scale: factor on the logits before the cap (Cohere, Granite).
        budget_bytes: bytes that the logits of one chunk of rows may take; None for the device's default.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target lies outside [0, V).
    """
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, budget_bytes)
    hidden_NH = autocast_hidden(hidden_NH)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias))
    return _LinearLogprob.apply(hidden_NH, weight_VH, target_N.long(), bias, softcap, scale, budget_bytes, needs)


class _LinearLogprob(torch.autograd.Function):
    """Two ways, by what needs a gradient. D is `onehot - softmax` times the slopes of cap and scale.

    - the hidden states alone: forward keeps `D @ W` [N, H], backward multiplies each row by its coefficient;
    - weight or bias too: D is kept where all rows fit one chunk, and computed again per chunk where they do not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
        budget_bytes: int | None,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        num_rows = hidden_NH.shape[0]
        dtype = statistics_dtype(hidden_NH.dtype)
        step = rows_per_chunk(num_rows, weight_VH.shape[0], dtype.itemsize, budget_bytes, hidden_NH.device)
        logp_N = torch.empty(num_rows, dtype=dtype, device=hidden_NH.device)
        keeps_hidden_grad = needs[0] and not (needs[1] or needs[2])
        unit_grad_NH = torch.empty_like(hidden_NH) if keeps_hidden_grad else None
        dlogits_nV = None
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            logp_N[rows], dlogits_nV = _logprob_rows(
                hidden_NH[rows], weight_VH, target_N[rows], bias_V, softcap, scale, with_dlogits=any(needs)
            )
            if unit_grad_NH is not None and dlogits_nV is not None:
                unit_grad_NH[rows] = _gemm(dlogits_nV, weight_VH, hidden_NH.dtype)
        all_in_one_chunk = step >= num_rows and not keeps_hidden_grad
        # The weight itself, never a view of it: ZeRO-3 gathers the parameter again before the backward.
        ctx.save_for_backward(
            hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, dlogits_nV if all_in_one_chunk else None
        )
        ctx.softcap, ctx.scale, ctx.step = softcap, scale, step
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, bias_V, unit_grad_NH, kept_dlogits_NV = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        if unit_grad_NH is not None:
            grad_hidden_NH = (unit_grad_NH * grad_logp_N[:, None]).to(hidden_NH.dtype)
            return grad_hidden_NH, *[None] * 7
        num_rows, dtype = hidden_NH.shape[0], grad_logp_N.dtype
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if needs_weight and num_rows != ctx.step else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        for start in range(0, num_rows, ctx.step):
            rows = slice(start, start + ctx.step)
            coefficient_n1 = grad_logp_N[rows, None]
            dlogits_nV = kept_dlogits_NV
            if dlogits_nV is None:
                _, dlogits_nV = _logprob_rows(
                    hidden_NH[rows],
                    weight_VH,
                    target_N[rows],
                    bias_V,
                    ctx.softcap,
                    ctx.scale,
                    with_dlogits=True,
                )
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = _gemm(dlogits_nV, weight_VH, hidden_NH.dtype) * coefficient_n1
            if needs_weight:
                # The coefficient scales the small operand: n x H products instead of n x V.
                partial_VH = _gemm(dlogits_nV.t(), hidden_NH[rows] * coefficient_n1, hidden_NH.dtype)
                grad_weight_VH = partial_VH if grad_weight_VH is None else grad_weight_VH.add_(partial_VH)
            if grad_bias_V is not None:
                grad_bias_V += (coefficient_n1.t() @ dlogits_nV)[0]
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(bias_V.dtype)
        return grad_hidden_NH, grad_weight_VH, None, grad_bias_V, None, None, None, None


def _gemm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in the GEMM precision of a model in `dtype`: on a CPU, fp16 GEMMs are far slower than fp32."""
    if dtype is torch.float16 and a.device.type == "cpu":
        dtype = torch.float32
    return torch.mm(a.to(dtype), b.to(dtype))


def _logits_fp32(hidden_nH: Tensor, weight_VH: Tensor) -> Tensor:
    """`hidden @ weight.T` in fp32; a CPU weight of another precision is converted tile by tile."""
    weight_dtype = statistics_dtype(hidden_nH.dtype)
    if hidden_nH.dtype is weight_VH.dtype and (hidden_nH.is_cuda or hidden_nH.dtype is weight_dtype):
        return mm_fp32(hidden_nH, weight_VH.t())
    vocab, hidden_size = weight_VH.shape
    logits_nV = torch.empty(hidden_nH.shape[0], vocab, dtype=weight_dtype, device=hidden_nH.device)
    tile = max(1, _WEIGHT_TILE_BYTES // (hidden_size * weight_dtype.itemsize))
    for start in range(0, vocab, tile):
        columns = slice(start, start + tile)
        logits_nV[:, columns] = mm_fp32(hidden_nH, weight_VH[columns].to(hidden_nH.dtype).t())
    return logits_nV


def _logprob_rows(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    target_n: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    with_dlogits: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [n] of a chunk and, if asked, D = d logp / d (hidden @ weight.T) [n, V] in the logits' memory."""
    with torch.autocast(hidden_nH.device.type, enabled=False):
        logits_nV = _logits_fp32(hidden_nH, weight_VH)
    if bias_V is not None:
        logits_nV += bias_V
    if scale != 1.0:
        logits_nV *= scale
    slope_nV = None
    if softcap is not None:
        logits_nV.div_(softcap).tanh_()
        slope_nV = (1 - logits_nV.square()) if with_dlogits else None
        logits_nV *= softcap
    max_n1 = logits_nV.amax(dim=1, keepdim=True)
    logits_nV -= max_n1
    target_logit_n1 = logits_nV.gather(1, target_n[:, None])
    sum_n1 = logits_nV.exp_().sum(dim=1, keepdim=True)
    logp_n = (target_logit_n1 - sum_n1.log())[:, 0]
    if not with_dlogits:
        return logp_n, None
    logits_nV /= -sum_n1
    logits_nV.scatter_add_(1, target_n[:, None], torch.ones_like(sum_n1))
    if slope_nV is not None:
        logits_nV *= slope_nV
    if scale != 1.0:
        logits_nV *= scale
    return logp_n, logits_nV


def preference_loss(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    token_weight_N: Tensor | None = None,
    num_completions: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every pair from the token log-probs of policy and reference.

    With `r_k = sum over tokens i of completion k of weight_i * (policy_i - reference_i)` and
    `x = beta * (r_chosen - r_rejected)`, eps the label smoothing:

        sigmoid  -(1 - eps) log sigmoid(x) - eps log sigmoid(-x)                    DPO, arXiv 2305.18290 eq. 7
        robust   (-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)) / (1 - 2 eps)    arXiv 2403.00409
        hinge    max(0, 1 - x)                                                      SLiC, arXiv 2309.06657
        ipo      (x / beta - 1 / (2 beta))^2                                        arXiv 2310.12036 eq. 17

    Args:
        policy_logp_N: [N] token log-probs of the policy; the losses carry its gradient.
        reference_logp_N: [N] token log-probs of the reference, a constant.
        completion_of_token_N: [N] int64, the completion each token belongs to, in any order.
        pairs_P2: [P, 2] int64 rows of (chosen, rejected) completions; a completion may be in many pairs.
        beta: strength of the reference, > 0.
        label_smoothing: share of flipped pairs in [0, 0.5); sigmoid and robust only.
        loss_type: sigmoid, hinge, ipo or robust. IPO on mean log-probs: give weights 1 / length.
        token_weight_N: [N] weight of each token's log-ratio, a constant; None for 1.
        num_completions: K. None: the highest index + 1, which on CUDA waits for the device.

    Returns:
        losses [P], and the rewards `beta * r` of the chosen [P] and rejected [P] sides, detached; all fp32
        (fp64 for fp64 policy log-probs).

    Raises:
        ValueError: shapes, dtypes, devices, indices or options do not fit.
    """
    check_preference_options(beta, label_smoothing, loss_type)
    num_completions = check_preference_loss(
        policy_logp_N, reference_logp_N, completion_of_token_N, pairs_P2, token_weight_N, num_completions
    )
    dtype = statistics_dtype(policy_logp_N.dtype)
    ratio_N = policy_logp_N.to(dtype) - reference_logp_N.detach().to(dtype)
    if token_weight_N is not None:
        ratio_N = ratio_N * token_weight_N.detach().to(dtype)
    zeros_K = torch.zeros(num_completions, dtype=dtype, device=ratio_N.device)
    ratio_K = zeros_K.index_add(0, completion_of_token_N.long(), ratio_N)
    chosen_P, rejected_P = ratio_K[pairs_P2[:, 0].long()], ratio_K[pairs_P2[:, 1].long()]
    losses_P = _pair_losses(chosen_P - rejected_P, beta, label_smoothing, loss_type)
    return losses_P, beta * chosen_P.detach(), beta * rejected_P.detach()


def _pair_losses(margin_P: Tensor, beta: float, label_smoothing: float, loss_type: str) -> Tensor:
    """Losses of `margin = r_chosen - r_rejected`; see `preference_loss` for the equations."""
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin_P)
    if loss_type == "ipo":
        return (margin_P - 1 / (2 * beta)).square()
    # log sigmoid(-x) = log sigmoid(x) - x turns both smoothed losses into one log-sigmoid plus a line,
    # and a margin of 0 then gives log 2 to the last bit whatever the smoothing.
    slope = label_smoothing if loss_type == "sigmoid" else -label_smoothing / (1 - 2 * label_smoothing)
    x_P = beta * margin_P
    return slope * x_P - F.logsigmoid(x_P)
