"""The preference loss of every pair from token log-probs: one launch forward, one launch backward, no atomics.

Legend: N tokens, K completions, P pairs.

Forward: one program per pair adds up the tokens of its two completions: those between their offsets where the
completions are contiguous, else all tokens are walked, and blocks that hold none of them cost only the read of their
completion numbers. A token has the same place in its block in every pair, so that a completion's reward is the same
number in all of them. Backward: one program per block of tokens adds up the pairs of each completion that occurs in it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import align, check_preference_loss, check_preference_options, check_triton_dtype

BLOCK_N = 1024
BACKWARD_BLOCK_N = 256
BACKWARD_BLOCK_P = 256
NUM_WARPS = 4


@triton.jit
def pair_loss(margin, beta, slope, LOSS_TYPE: tl.constexpr):
    """Loss of a margin and its derivative by the margin; `slope` holds the label smoothing."""
    x = beta * margin
    if LOSS_TYPE == "hinge":
        loss = tl.maximum(1.0 - x, 0.0)
        derivative = tl.where(x < 1.0, -beta, 0.0)
    elif LOSS_TYPE == "ipo":
        difference = margin - 0.5 / beta
        loss = difference * difference
        derivative = 2.0 * difference
    else:
        small = tl.exp(-tl.abs(x))
        # log(1 + small) keeps its digits where 1 + small has lost them.
        rounded = 1.0 + small
        lost = rounded - 1.0
        log1p = tl.where(lost == 0.0, small, tl.log(rounded) * (small / tl.where(lost == 0.0, 1.0, lost)))
        loss = slope * x + tl.maximum(-x, 0.0) + log1p
        derivative = beta * (slope - tl.where(x > 0.0, small, 1.0) / rounded)
    return loss, derivative


@triton.jit
def preference_loss_fwd_kernel(
    policy_ptr,
    reference_ptr,
    completion_ptr,
    pairs_ptr,
    weight_ptr,
    starts_ptr,
    loss_ptr,
    chosen_ptr,
    rejected_ptr,
    derivative_ptr,
    N,
    beta,
    slope,
    LOSS_TYPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    chosen = tl.load(pairs_ptr + 2 * pair)
    rejected = tl.load(pairs_ptr + 2 * pair + 1)
    chosen_sum = tl.zeros([BLOCK_N], tl.float32)
    rejected_sum = tl.zeros([BLOCK_N], tl.float32)
    first, last = 0, N
    if HAS_STARTS:
        first = tl.minimum(tl.load(starts_ptr + chosen), tl.load(starts_ptr + rejected)).to(tl.int32)
        last = tl.maximum(tl.load(starts_ptr + chosen + 1), tl.load(starts_ptr + rejected + 1)).to(tl.int32)
    for start in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = token < N
        completion = tl.load(completion_ptr + token, mask=inside, other=-1)
        is_chosen = inside & (completion == chosen)
        is_rejected = inside & (completion == rejected)
        wanted = is_chosen | is_rejected
        if tl.max(wanted.to(tl.int32), 0) > 0:
            policy = tl.load(policy_ptr + token, mask=wanted, other=0.0).to(tl.float32)
            ratio = policy - tl.load(reference_ptr + token, mask=wanted, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                ratio *= tl.load(weight_ptr + token, mask=wanted, other=0.0).to(tl.float32)
            chosen_sum += tl.where(is_chosen, ratio, 0.0)
            rejected_sum += tl.where(is_rejected, ratio, 0.0)
    chosen_ratio = tl.sum(chosen_sum, 0)
    rejected_ratio = tl.sum(rejected_sum, 0)
    loss, derivative = pair_loss(chosen_ratio - rejected_ratio, beta, slope, LOSS_TYPE)
    tl.store(loss_ptr + pair, loss)
    tl.store(chosen_ptr + pair, beta * chosen_ratio)
    tl.store(rejected_ptr + pair, beta * rejected_ratio)
    tl.store(derivative_ptr + pair, derivative)


@triton.jit
def preference_loss_bwd_kernel(
    grad_loss_ptr,
    derivative_ptr,
    completion_ptr,
    pairs_ptr,
    weight_ptr,
    grad_policy_ptr,
    N,
    P,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < N
    completion = tl.load(completion_ptr + token, mask=inside, other=-1).to(tl.int32)
    lowest = tl.min(tl.where(inside, completion, 2147483647), 0)
    highest = tl.max(completion, 0)
    grad = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P).to(tl.int64)
        exists = pair < P
        chosen = tl.load(pairs_ptr + 2 * pair, mask=exists, other=-2).to(tl.int32)
        rejected = tl.load(pairs_ptr + 2 * pair + 1, mask=exists, other=-2).to(tl.int32)
        touches = ((chosen >= lowest) & (chosen <= highest)) | ((rejected >= lowest) & (rejected <= highest))
        if tl.max(touches.to(tl.int32), 0) > 0:
            grad_margin = tl.load(grad_loss_ptr + pair, mask=exists, other=0.0)
            grad_margin *= tl.load(derivative_ptr + pair, mask=exists, other=0.0)
            # Contiguous completions of some hundred tokens: one or two of them occur in a block.
            for one in range(lowest, highest + 1):
                of_pairs = tl.where(chosen == one, grad_margin, 0.0) - tl.where(rejected == one, grad_margin, 0.0)
                grad += tl.where(completion == one, tl.sum(of_pairs, 0), 0.0)
    if HAS_WEIGHT:
        grad *= tl.load(weight_ptr + token, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_policy_ptr + token, grad.to(grad_policy_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("bpo_kernels::preference_loss_fwd", mutates_args=())
def forward(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    beta: float,
    label_smoothing: float,
    loss_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, chosen rewards, rejected rewards and the derivatives of the losses by the margins, all [P] fp32."""
    num_pairs = pairs_P2.shape[0]
    rows = [torch.empty(num_pairs, dtype=torch.float32, device=policy_logp_N.device) for _ in range(4)]
    # See reference._pair_losses: both smoothed losses are one log-sigmoid plus a line.
    slope = label_smoothing if loss_type == "sigmoid" else -label_smoothing / (1 - 2 * label_smoothing)
    if num_pairs:
        with torch.cuda.device_of(policy_logp_N):
            preference_loss_fwd_kernel[(num_pairs,)](
                policy_logp_N.contiguous(),
                reference_logp_N.contiguous(),
                align(completion_of_token_N.contiguous()),
                align(pairs_P2.contiguous()),
                None if token_weight_N is None else token_weight_N.contiguous(),
                None if completion_starts_K1 is None else align(completion_starts_K1.contiguous()),
                *rows,
                policy_logp_N.shape[0],
                beta,
                slope,
                LOSS_TYPE="sigmoid" if loss_type == "robust" else loss_type,
                HAS_WEIGHT=token_weight_N is not None,
                HAS_STARTS=completion_starts_K1 is not None,
                BLOCK_N=BLOCK_N,
                num_warps=NUM_WARPS,
            )
    return rows[0], rows[1], rows[2], rows[3]


@forward.register_fake
def _(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    beta: float,
    label_smoothing: float,
    loss_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def row() -> Tensor:
        return policy_logp_N.new_empty(pairs_P2.shape[0], dtype=torch.float32)

    return row(), row(), row(), row()


@torch.library.custom_op("bpo_kernels::preference_loss_bwd", mutates_args=())
def backward(
    grad_losses_P: Tensor,
    derivative_P: Tensor,
    policy_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
) -> Tensor:
    num_tokens = policy_logp_N.shape[0]
    grad_policy_N = torch.empty(num_tokens, dtype=policy_logp_N.dtype, device=policy_logp_N.device)
    if num_tokens:
        with torch.cuda.device_of(policy_logp_N):
            preference_loss_bwd_kernel[(triton.cdiv(num_tokens, BACKWARD_BLOCK_N),)](
                grad_losses_P.contiguous(),
                derivative_P,
                align(completion_of_token_N.contiguous()),
                align(pairs_P2.contiguous()),
                None if token_weight_N is None else token_weight_N.contiguous(),
                grad_policy_N,
                num_tokens,
                pairs_P2.shape[0],
                HAS_WEIGHT=token_weight_N is not None,
                BLOCK_N=BACKWARD_BLOCK_N,
                BLOCK_P=BACKWARD_BLOCK_P,
                num_warps=NUM_WARPS,
            )
    return grad_policy_N


@backward.register_fake
def _(
    grad_losses_P: Tensor,
    derivative_P: Tensor,
    policy_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
) -> Tensor:
    return policy_logp_N.new_empty(policy_logp_N.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy_logp_N, _, completion_of_token_N, pairs_P2, token_weight_N = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], policy_logp_N, completion_of_token_N, pairs_P2, token_weight_N)


def _gradient(ctx: Any, grad_losses_P: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_losses_P is None:
        return (None,) * 9
    return backward(grad_losses_P, *ctx.saved_tensors), *[None] * 8


forward.register_autograd(_gradient, setup_context=_save)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [P] and the detached rewards of both sides [P], fp32; see `reference.preference_loss`.

    `num_completions` only serves the index checks, which are left out on CUDA; no tensor is read on the host there.
    """
    check_preference_options(beta, label_smoothing, loss_type)
    check_triton_dtype("policy_logp_N", policy_logp_N)
    if num_completions is None and policy_logp_N.is_cuda:
        num_completions = 0
    check_preference_loss(
        policy_logp_N,
        reference_logp_N,
        completion_of_token_N,
        pairs_P2,
        token_weight_N,
        num_completions,
        completion_starts_K1,
    )
    losses_P, chosen_rewards_P, rejected_rewards_P, _ = forward(
        policy_logp_N,
        reference_logp_N.detach(),
        completion_of_token_N,
        pairs_P2,
        None if token_weight_N is None else token_weight_N.detach(),
        completion_starts_K1,
        beta,
        label_smoothing,
        loss_type,
    )
    return losses_P, chosen_rewards_P.detach(), rejected_rewards_P.detach()
