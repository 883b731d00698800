"""All operations in plain PyTorch: the reference for the Triton kernels, and the implementation on CPUs.

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
    IGNORED_TARGET,
    autocast_hidden,
    check_linear_logprob,
    check_logprob_gather,
    check_preference_loss,
    check_preference_options,
    check_reference,
    rows_per_chunk,
    statistics_dtype,
)
from .plain_head import linear_logprob
from .plain_lora import lora_linear
from .plain_second import second_target_logprob

__all__ = [
    "linear_logprob",
    "linear_preference_loss",
    "logprob_gather",
    "lora_linear",
    "preference_loss",
    "second_target_logprob",
]

# logprob_gather processes chunks of logits that fit a CPU's cache: several passes cost little more than one.
_GATHER_CHUNK_BYTES = 2 << 20


def logprob_gather(logits_NV: Tensor, target_N: Tensor, *, inplace_backward: bool = False) -> Tensor:
    """`log_softmax(logits.float(), -1).gather(1, target[:, None])[:, 0]`, differentiable in the logits.

    Args:
        logits_NV: [N, V] in any float type and layout.
        target_N: [N] int64 or int32 token ids; -100 masks a row: log-prob 0, no gradient.
        inplace_backward: write the gradient into the logits' own memory, which saves [N, V]. If the operation that
            made the logits needs them in its backward (a softcap does, a linear layer does not), autograd raises.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes, dtypes or devices do not match, a target is outside [0, V), or the logits cannot be
            overwritten (a leaf, or memory that several of them share).
    """
    check_logprob_gather(logits_NV, target_N, inplace_backward)
    return _LogprobGather.apply(logits_NV, target_N.long(), inplace_backward)


class _LogprobGather(torch.autograd.Function):
    """Saves maximum and log-sum separately: their sum would lose precision for logits in the thousands."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, inplace_backward: bool) -> Tensor:
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
        ctx.inplace_backward = inplace_backward
        target_logit_N1 = logits_NV.gather(1, target_N.clamp(min=0)[:, None]).to(dtype)
        ignored_N1 = (target_N == IGNORED_TARGET)[:, None]
        return (target_logit_N1 - max_N1 - log_sum_N1).masked_fill(ignored_N1, 0.0)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, target_N, max_N1, log_sum_N1 = ctx.saved_tensors
        grad_logits_NV = logits_NV.detach() if ctx.inplace_backward else torch.empty_like(logits_NV)
        grad_logp_N = grad_logp_N.masked_fill(target_N == IGNORED_TARGET, 0.0)
        num_rows, step = logits_NV.shape[0], _gather_step(logits_NV)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            dlogits_nV = (logits_NV[rows].to(max_N1.dtype) - max_N1[rows]).sub_(log_sum_N1[rows]).exp_().neg_()
            dlogits_nV.scatter_add_(1, target_N[rows, None].clamp(min=0), torch.ones_like(max_N1[rows]))
            grad_logits_NV[rows] = dlogits_nV.mul_(grad_logp_N[rows, None])
        return grad_logits_NV, None, None


def _gather_step(logits_NV: Tensor) -> int:
    budget_bytes = None if logits_NV.is_cuda else _GATHER_CHUNK_BYTES
    itemsize = statistics_dtype(logits_NV.dtype).itemsize
    num_rows, vocab = logits_NV.shape
    return rows_per_chunk(num_rows, vocab, itemsize, budget_bytes, logits_NV.device)


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
    completion_starts_K1: Tensor | None = None,
    pair_beta_P: Tensor | None = None,
    pair_weight_P: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair from the token log-probs of policy and reference.

    With `r_k = sum over tokens i of completion k of weight_i * (policy_i - reference_i)` and
    `x = beta * (r_chosen - r_rejected)`, eps the label smoothing, `beta` of pair p meaning `beta * pair_beta_P[p]`:

        sigmoid  -(1 - eps) log sigmoid(x) - eps log sigmoid(-x)                    DPO, arXiv 2305.18290 eq. 7
        robust   (-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)) / (1 - 2 eps)    arXiv 2403.00409
        hinge    max(0, 1 - x)                     SLiC-HF, arXiv 2305.10425, on log-ratios as in RSO, arXiv 2309.06657
        ipo      (x / beta - 1 / (2 beta))^2                                        arXiv 2310.12036 eq. 17

    Args:
        policy_logp_N: [N] token log-probs of the policy; the losses carry its gradient.
        reference_logp_N: [N] token log-probs of the reference; no gradient.
        completion_of_token_N: [N] int64, index of the completion of each token, in any order.
        pairs_P2: [P, 2] int64 rows of (chosen, rejected) completions; a completion may be in many pairs. A side of -1
            is an anchor, the constant 0: log-ratio and reward 0, no gradient.
        beta: strength of the regularisation towards the reference, > 0.
        label_smoothing: fraction of flipped pairs in [0, 0.5); sigmoid and robust only.
        loss_type: sigmoid, hinge, ipo or robust. For IPO on mean log-probs, pass weights 1 / length.
        token_weight_N: [N] weight of each token's log-ratio, without gradient; None for 1.
        num_completions: K; None for the highest index + 1, which on CUDA waits for the device.
        completion_starts_K1: [K + 1] offsets of completions stored in order; without them Triton sorts the tokens.
        pair_beta_P: [P] positive factor of `beta` for each pair, without gradient; None for 1.
        pair_weight_P: [P] factor of each pair's loss (not of its rewards), without gradient; None for 1.

    Returns:
        losses [P], and the rewards `beta * r` of the chosen [P] and rejected [P] sides, detached; all fp32
        (fp64 for fp64 policy log-probs).

    Raises:
        ValueError: shapes, dtypes, devices, indices or options are invalid.
    """
    check_preference_options(beta, label_smoothing, loss_type)
    tensors = (policy_logp_N, reference_logp_N, completion_of_token_N, pairs_P2, token_weight_N)
    optional = (num_completions, completion_starts_K1, pair_beta_P, pair_weight_P)
    num_completions = check_preference_loss(*tensors, *optional)
    chosen_P, rejected_P = _pair_ratios(*tensors, num_completions)
    dtype = chosen_P.dtype
    beta_P = beta if pair_beta_P is None else beta * pair_beta_P.detach().to(dtype)
    losses_P = _pair_losses(chosen_P - rejected_P, beta_P, label_smoothing, loss_type)
    if pair_weight_P is not None:
        losses_P = losses_P * pair_weight_P.detach().to(dtype)
    return losses_P, beta_P * chosen_P.detach(), beta_P * rejected_P.detach()


def _pair_ratios(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    num_completions: int,
) -> tuple[Tensor, ...]:
    """Log-ratios of the chosen and the rejected sides [P]."""
    dtype = statistics_dtype(policy_logp_N.dtype)
    ratio_N = policy_logp_N.to(dtype) - reference_logp_N.detach().to(dtype)
    if token_weight_N is not None:
        ratio_N = ratio_N * token_weight_N.detach().to(dtype)
    zeros_K = torch.zeros(num_completions, dtype=dtype, device=ratio_N.device)
    ratio_K = zeros_K.index_add(0, completion_of_token_N.long(), ratio_N)
    # An anchor's index, -1, is that of the 0 behind the last completion.
    return F.pad(ratio_K, (0, 1))[pairs_P2.long()].unbind(1)


def _pair_losses(margin_P: Tensor, beta: float | Tensor, label_smoothing: float, loss_type: str) -> Tensor:
    """Losses as functions of `margin = r_chosen - r_rejected`; equations in `preference_loss`."""
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin_P)
    if loss_type == "ipo":
        return (margin_P - 1 / (2 * beta)).square()
    # By log sigmoid(-x) = log sigmoid(x) - x both smoothed losses are a log-sigmoid plus a linear term, so that a
    # margin of 0 gives exactly log 2 for any smoothing.
    slope = label_smoothing if loss_type == "sigmoid" else -label_smoothing / (1 - 2 * label_smoothing)
    x_P = beta * margin_P
    return slope * x_P - F.logsigmoid(x_P)


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
    """`preference_loss(linear_logprob(policy), reference)` in one call, as training uses it.

    Args:
        reference: [N] stored log-probs of the targets, or the reference's hidden states [N, H] of the same rows.
        reference_weight_VH, reference_bias: the own head of a live reference; None shares the policy's head, and both
            run in the same GEMMs.
        Others: as in `linear_logprob` and `preference_loss`.

    Returns:
        losses [P]; rewards of the chosen [P] and rejected [P] sides, detached; log-probs [N] of the policy, which are
        differentiable too (for an additional likelihood term).

    Raises:
        ValueError: shapes, dtypes, devices, indices or options are invalid.
    """
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias, softcap, mode, budget_bytes)
    check_reference(reference, reference_weight_VH, reference_bias, hidden_NH, weight_VH)
    head_options: dict[str, Any] = {"softcap": softcap, "scale": scale, "mode": mode, "budget_bytes": budget_bytes}
    logp_N = linear_logprob(hidden_NH, weight_VH, target_N, bias, **head_options)
    if reference.dim() == 2:
        head = (weight_VH, bias) if reference_weight_VH is None else (reference_weight_VH, reference_bias)
        with torch.no_grad():
            rows_NH = reference.to(autocast_hidden(hidden_NH).dtype)
            reference = linear_logprob(rows_NH, head[0], target_N, head[1], **head_options)
    loss_options = (beta, label_smoothing, loss_type, token_weight_N, num_completions, completion_starts_K1)
    pairs = (pairs_P2, *loss_options, pair_beta_P, pair_weight_P)
    return *preference_loss(logp_N, reference, completion_of_token_N, *pairs), logp_N
