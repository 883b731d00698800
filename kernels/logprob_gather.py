"""Log-probs of the targets from existing logits: one read forward, one read and one write backward.

Legend: N rows, V vocabulary.

One program per row iterates over the vocabulary in tiles. Each lane of a tile keeps its own maximum and sum of
exponentials, so that the lanes are reduced once per row instead of once per tile. Maximum and log-sum of the row are
saved separately for the backward: their sum would lose precision for logits in the thousands.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import IGNORED_TARGET, align, check_logprob_gather, check_triton_dtype
from .online_softmax import LOWEST, lane_softmax_update

MAX_BLOCK_V = 4096
NUM_WARPS = 8


@triton.jit
def logprob_gather_fwd_kernel(
    logits_ptr,
    target_ptr,
    logp_ptr,
    max_ptr,
    log_sum_ptr,
    V,
    stride_n,
    stride_v,
    IGNORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_n
    lane_max = tl.full([BLOCK_V], LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V).to(tl.int64)
        z = tl.load(logits_row + column * stride_v, mask=column < V, other=-float("inf")).to(tl.float32)
        lane_max, lane_sum = lane_softmax_update(lane_max, lane_sum, z)
    row_max = tl.max(lane_max, 0)
    log_sum = tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), 0))
    target = tl.load(target_ptr + row).to(tl.int64)
    in_range = (target >= 0) & (target < V)
    target_logit = tl.load(logits_row + target * stride_v, mask=in_range, other=float("nan")).to(tl.float32)
    tl.store(logp_ptr + row, tl.where(target == IGNORED, 0.0, target_logit - row_max - log_sum))
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def logprob_gather_bwd_kernel(
    grad_logp_ptr,
    logits_ptr,
    target_ptr,
    max_ptr,
    log_sum_ptr,
    grad_logits_ptr,
    V,
    stride_n,
    stride_v,
    grad_stride_n,
    grad_stride_v,
    IGNORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # grad_logits may be the logits' own memory: a tile is read completely before it is written.
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_n
    grad_row = grad_logits_ptr + row * grad_stride_n
    grad_logp = tl.load(grad_logp_ptr + row)
    row_max = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int64)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V).to(tl.int64)
        inside = column < V
        z = tl.load(logits_row + column * stride_v, mask=inside, other=-float("inf")).to(tl.float32)
        probability = tl.exp(z - row_max - log_sum)
        grad = grad_logp * (tl.where(column == target, 1.0, 0.0) - probability)
        grad = tl.where(target == IGNORED, 0.0, grad)
        tl.store(grad_row + column * grad_stride_v, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def block_v(vocab: int) -> int:
    """Tile of the vocabulary: a power of two, at most MAX_BLOCK_V."""
    return min(MAX_BLOCK_V, max(128, triton.next_power_of_2(vocab)))


@torch.library.custom_op("bpo_kernels::logprob_gather_fwd", mutates_args=())
def _forward(logits_NV: Tensor, target_N: Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab = logits_NV.shape
    logp_N, max_N, log_sum_N = (torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device) for _ in range(3))
    if num_rows:
        with torch.cuda.device_of(logits_NV):
            logprob_gather_fwd_kernel[(num_rows,)](
                logits_NV,
                align(target_N),
                logp_N,
                max_N,
                log_sum_N,
                vocab,
                *logits_NV.stride(),
                IGNORED=IGNORED_TARGET,
                BLOCK_V=block_v(vocab),
                num_warps=NUM_WARPS,
            )
    return logp_N, max_N, log_sum_N


@_forward.register_fake
def _(logits_NV: Tensor, target_N: Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
    def row() -> Tensor:
        return logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32)

    return row(), row(), row()


def _launch_backward(
    grad_logp_N: Tensor, logits_NV: Tensor, target_N: Tensor, max_N: Tensor, log_sum_N: Tensor, grad_logits_NV: Tensor
) -> None:
    num_rows, vocab = logits_NV.shape
    if num_rows:
        with torch.cuda.device_of(logits_NV):
            logprob_gather_bwd_kernel[(num_rows,)](
                grad_logp_N.contiguous(),
                logits_NV,
                align(target_N),
                max_N,
                log_sum_N,
                grad_logits_NV,
                vocab,
                *logits_NV.stride(),
                *grad_logits_NV.stride(),
                IGNORED=IGNORED_TARGET,
                BLOCK_V=block_v(vocab),
                num_warps=NUM_WARPS,
            )


@torch.library.custom_op("bpo_kernels::logprob_gather_bwd", mutates_args=())
def _backward(grad_logp_N: Tensor, logits_NV: Tensor, target_N: Tensor, max_N: Tensor, log_sum_N: Tensor) -> Tensor:
    grad_logits_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    _launch_backward(grad_logp_N, logits_NV, target_N, max_N, log_sum_N, grad_logits_NV)
    return grad_logits_NV


@_backward.register_fake
def _(grad_logp_N: Tensor, logits_NV: Tensor, target_N: Tensor, max_N: Tensor, log_sum_N: Tensor) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape)


# Declared as a mutation, so that autograd rejects a saved tensor that shares the overwritten memory.
@torch.library.custom_op("bpo_kernels::logprob_gather_bwd_", mutates_args={"logits_NV"})
def _backward_in_place(
    grad_logp_N: Tensor, logits_NV: Tensor, target_N: Tensor, max_N: Tensor, log_sum_N: Tensor
) -> None:
    _launch_backward(grad_logp_N, logits_NV, target_N, max_N, log_sum_N, logits_NV)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_NV, target_N, ctx.inplace_backward = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits_NV, target_N, *output[1:])


def _gradient(ctx: Any, grad_logp_N: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
    if grad_logp_N is None:
        return None, None, None
    logits_NV, *rows = ctx.saved_tensors
    if ctx.inplace_backward:
        grad_logits_NV = logits_NV.detach()
        _backward_in_place(grad_logp_N, grad_logits_NV, *rows)
        return grad_logits_NV, None, None
    return _backward(grad_logp_N, logits_NV, *rows), None, None


_forward.register_autograd(_gradient, setup_context=_save)


def logprob_gather(logits_NV: Tensor, target_N: Tensor, *, inplace_backward: bool = False) -> Tensor:
    """`log_softmax(logits.float(), -1).gather(1, target[:, None])[:, 0]`; see `plain.logprob_gather`.

    On CUDA targets are not range-checked; the log-prob of one outside [0, V) is NaN.
    """
    check_logprob_gather(logits_NV, target_N, inplace_backward)
    check_triton_dtype("logits_NV", logits_NV)
    return _forward(logits_NV, target_N.contiguous(), inplace_backward)[0]
