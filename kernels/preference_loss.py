"""The preference loss of each pair from token log-probs: work and bytes linear in tokens + pairs, no float atomics.

Legend: N tokens, K completions, P pairs, M sides of pairs.

| | launches forward | backward |
|---|---|---|
| up to DIRECT_TOKENS tokens and DIRECT_PAIRS pairs | 1: each pair sums its tokens | 1: its pairs, its tokens |
| more tokens, up to DIRECT_PAIRS pairs | 2: the sum of each piece of a completion; the losses | 1 |
| more pairs | 2 | 3: the largest margin gradient; the coefficient of each completion; its tokens |

`completion_starts_K1` locates each completion's tokens. Without it the tokens are sorted first, forward and backward:
about 20 PyTorch launches each way, a radix sort of N integers, copies of the [N] tensors.

Results are deterministic, and the order of the pairs changes no bit of a gradient (see README.md).
`preference_sizes.moved_bytes` computes the bytes that the kernels load and store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import preference_kernels as kernels
from . import preference_sizes as sizes
from .checks import ANCHOR, align, check_preference_loss, check_preference_options, check_triton_dtype


@dataclass(frozen=True)
class _Batch:
    """Completions stored consecutively.

    order_N: positions of the tokens before sorting; None if they were not sorted.
    """

    completion_N: Tensor
    pairs_P2: Tensor
    starts_K1: Tensor
    order_N: Tensor | None

    @property
    def num_completions(self) -> int:
        return self.starts_K1.shape[0] - 1

    def sorted(self, values_N: Tensor | None) -> Any:
        if values_N is None:
            return None
        return values_N.contiguous() if self.order_N is None else values_N[self.order_N]


def _batch(completion_N: Tensor, pairs_P2: Tensor, starts_K1: Tensor | None) -> _Batch:
    """The completions as stored or, without offsets, sorted: those of the pairs, then the tokens of no pair.

    When sorting, K is unknown and indices are arbitrary: a completion's new index is its rank among all pairs' sides.
    Anchors, which are no completions, keep a negative index.
    """
    completion_N, pairs_P2 = completion_N.contiguous(), pairs_P2.contiguous()
    if starts_K1 is not None:
        return _Batch(align(completion_N), align(pairs_P2), align(starts_K1.contiguous()), None)
    sides_M = pairs_P2.to(completion_N.dtype).flatten().sort().values
    place_N = torch.searchsorted(sides_M, completion_N, out_int32=True)
    # place_N is M if no side is as large: -1 is never an index.
    is_named_N = F.pad(sides_M, (0, 1), value=-1)[place_N] == completion_N
    sorted_N, order_N = place_N.where(is_named_N, sides_M.shape[0]).sort(stable=True)
    bounds = torch.arange(sides_M.shape[0] + 2, dtype=torch.int32, device=sides_M.device)
    starts_K1 = torch.searchsorted(sorted_N, bounds)
    ranks_P2 = torch.searchsorted(sides_M, pairs_P2.to(sides_M.dtype)).masked_fill_(pairs_P2 < 0, ANCHOR)
    return _Batch(sorted_N, ranks_P2, starts_K1, order_N)


@dataclass(frozen=True)
class _Pairs:
    """What is computed for each pair.

    rows: losses, rewards of both sides, derivatives [P], to be written.
    beta_P, weight_P: own factors of beta and of the loss, or None.
    slope: encodes the label smoothing.
    """

    rows: list[Tensor]
    beta_P: Tensor | None
    weight_P: Tensor | None
    beta: float
    slope: float
    loss_type: str

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        factors = (self.beta_P, self.weight_P)
        return *self.rows, *(None if factor is None else factor.contiguous() for factor in factors)

    @property
    def constants(self) -> dict[str, Any]:
        given = {"HAS_PAIR_BETA": self.beta_P is not None, "HAS_PAIR_WEIGHT": self.weight_P is not None}
        return {"LOSS_TYPE": self.loss_type} | given


@torch.library.custom_op("bpo_kernels::preference_loss_fwd", mutates_args=())
def forward(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    pair_beta_P: Tensor | None,
    pair_weight_P: Tensor | None,
    beta: float,
    label_smoothing: float,
    loss_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, chosen rewards, rejected rewards, derivatives of the losses with respect to the margins; all [P] fp32."""
    num_tokens, num_pairs = policy_logp_N.shape[0], pairs_P2.shape[0]
    rows = [torch.empty(num_pairs, dtype=torch.float32, device=policy_logp_N.device) for _ in range(4)]
    if num_pairs == 0:
        return rows[0], rows[1], rows[2], rows[3]
    # See plain._pair_losses: both smoothed losses are a log-sigmoid plus a linear term.
    slope = label_smoothing if loss_type == "sigmoid" else -label_smoothing / (1 - 2 * label_smoothing)
    pairs = _Pairs(rows, pair_beta_P, pair_weight_P, beta, slope, "sigmoid" if loss_type == "robust" else loss_type)
    batch = _batch(completion_of_token_N, pairs_P2, completion_starts_K1)
    policy_N, reference_N = batch.sorted(policy_logp_N), batch.sorted(reference_logp_N)
    weight_N = batch.sorted(token_weight_N)
    with torch.cuda.device_of(policy_logp_N):
        if sizes.is_direct(num_tokens, num_pairs):
            _launch_direct(batch, policy_N, reference_N, weight_N, pairs)
        else:
            _launch_sums_and_pairs(batch, policy_N, reference_N, weight_N, pairs)
    return rows[0], rows[1], rows[2], rows[3]


def _launch_direct(
    batch: _Batch,
    policy_N: Tensor,
    reference_N: Tensor,
    weight_N: Tensor | None,
    pairs: _Pairs,
) -> None:
    kernels.preference_loss_direct_kernel[(batch.pairs_P2.shape[0],)](
        policy_N,
        reference_N,
        batch.pairs_P2,
        weight_N,
        batch.starts_K1,
        *pairs.pointers,
        batch.num_completions,
        batch.pairs_P2.shape[0],
        pairs.beta,
        pairs.slope,
        **pairs.constants,
        HAS_WEIGHT=weight_N is not None,
        BLOCK_N=sizes.BLOCK_N,
        num_warps=sizes.NUM_WARPS,
    )


def _launch_sums_and_pairs(
    batch: _Batch,
    policy_N: Tensor,
    reference_N: Tensor,
    weight_N: Tensor | None,
    pairs: _Pairs,
) -> None:
    num_tokens, num_pairs = policy_N.shape[0], batch.pairs_P2.shape[0]
    piece = sizes.piece_tokens(num_tokens)
    num_completions, blocks = batch.num_completions, sizes.num_blocks(num_tokens)
    sums = torch.empty(num_completions + blocks, dtype=torch.float32, device=policy_N.device)
    programs = sizes.cdiv(num_completions, sizes.SUM_ROWS) + blocks
    if programs:
        kernels.preference_loss_sums_kernel[(programs,)](
            policy_N,
            reference_N,
            batch.completion_N,
            weight_N,
            batch.starts_K1,
            sums,
            num_completions,
            HAS_WEIGHT=weight_N is not None,
            PIECE=piece,
            ROWS=sizes.SUM_ROWS,
            COLUMNS=sizes.COLUMNS,
            num_warps=sizes.NUM_WARPS,
        )
    kernels.preference_loss_pairs_kernel[(sizes.cdiv(num_pairs, sizes.PAIR_ROWS),)](
        batch.pairs_P2,
        batch.starts_K1,
        sums,
        *pairs.pointers,
        num_completions,
        num_pairs,
        pairs.beta,
        pairs.slope,
        **pairs.constants,
        PIECE=piece,
        ROWS=sizes.PAIR_ROWS,
        COLUMNS=sizes.PAIR_COLUMNS,
        num_warps=sizes.NUM_WARPS,
    )


@forward.register_fake
def _(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
    pair_beta_P: Tensor | None,
    pair_weight_P: Tensor | None,
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
    completion_starts_K1: Tensor | None,
) -> Tensor:
    """Gradient of the policy's log-probs [N], in their dtype."""
    num_tokens, num_pairs = policy_logp_N.shape[0], pairs_P2.shape[0]
    grad_policy_N = torch.empty(num_tokens, dtype=policy_logp_N.dtype, device=policy_logp_N.device)
    if num_tokens == 0 or num_pairs == 0:
        return grad_policy_N.zero_()
    batch = _batch(completion_of_token_N, pairs_P2, completion_starts_K1)
    weight_N = batch.sorted(token_weight_N)
    programs = sizes.cdiv(batch.num_completions, sizes.GRAD_ROWS) + sizes.num_blocks(num_tokens)
    direct, bits = num_pairs <= sizes.DIRECT_PAIRS, sizes.fixed_point_bits(num_pairs)
    # A mean's gradient is one number with stride 0: it is read in place, not copied P times.
    grads = (grad_losses_P, grad_losses_P.stride(0), derivative_P)
    with torch.cuda.device_of(policy_logp_N):
        peak, units_K = (None, None) if direct else _launch_coefficients(batch, *grads, bits)
        kernels.preference_loss_bwd_kernel[(programs,)](
            *grads,
            batch.completion_N,
            batch.pairs_P2,
            weight_N,
            batch.starts_K1,
            peak,
            units_K,
            grad_policy_N,
            batch.num_completions,
            num_pairs,
            bits,
            DIRECT=direct,
            HAS_WEIGHT=weight_N is not None,
            PIECE=sizes.piece_tokens(num_tokens),
            ROWS=sizes.GRAD_ROWS,
            COLUMNS=sizes.COLUMNS,
            BLOCK_P=sizes.DIRECT_PAIRS,
            num_warps=sizes.NUM_WARPS,
        )
    if batch.order_N is None:
        return grad_policy_N
    unsorted_N = torch.empty_like(grad_policy_N)
    unsorted_N[batch.order_N] = grad_policy_N
    return unsorted_N


def _launch_coefficients(
    batch: _Batch, grad_losses_P: Tensor, grad_stride: int, derivative_P: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Largest margin gradient (first element of peaks); each completion's coefficient [K] in units of it."""
    num_pairs, num_completions = batch.pairs_P2.shape[0], batch.num_completions
    programs = sizes.num_peaks(num_pairs, num_completions)
    peaks = torch.empty(programs + 1, dtype=torch.float32, device=derivative_P.device)
    units_K = torch.empty(num_completions, dtype=torch.int64, device=derivative_P.device)
    grads = (grad_losses_P, grad_stride, derivative_P)
    kernels.preference_loss_peak_kernel[(programs,)](
        *grads, peaks, units_K, num_completions, num_pairs, programs, BLOCK=sizes.PEAK_BLOCK, num_warps=sizes.NUM_WARPS
    )
    kernels.preference_loss_scatter_kernel[(sizes.cdiv(num_pairs, sizes.BLOCK_P),)](
        *grads,
        batch.pairs_P2,
        peaks,
        units_K,
        num_completions,
        num_pairs,
        programs,
        bits,
        BLOCK_P=sizes.BLOCK_P,
        MAX_PEAKS=sizes.MAX_PEAKS,
        num_warps=sizes.NUM_WARPS,
    )
    return peaks, units_K


@backward.register_fake
def _(
    grad_losses_P: Tensor,
    derivative_P: Tensor,
    policy_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    completion_starts_K1: Tensor | None,
) -> Tensor:
    return policy_logp_N.new_empty(policy_logp_N.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy_logp_N, _, *constants = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], policy_logp_N, *constants)


def _gradient(ctx: Any, grad_losses_P: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_losses_P is None:
        return (None,) * 11
    return backward(grad_losses_P, *ctx.saved_tensors), *[None] * 10


forward.register_autograd(_gradient, setup_context=_save)


def constant(tensor: Tensor | None) -> Tensor | None:
    """`tensor` without its graph."""
    return None if tensor is None else tensor.detach()


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
    """Losses [P] and the detached rewards of both sides [P], fp32; see `plain.preference_loss`.

    `num_completions` is used only in the index checks, which are skipped on CUDA; no tensor is read on the host there.
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
        pair_beta_P,
        pair_weight_P,
    )
    losses_P, chosen_rewards_P, rejected_rewards_P, _ = forward(
        policy_logp_N,
        reference_logp_N.detach(),
        completion_of_token_N,
        pairs_P2,
        constant(token_weight_N),
        completion_starts_K1,
        constant(pair_beta_P),
        constant(pair_weight_P),
        beta,
        label_smoothing,
        loss_type,
    )
    return losses_P, chosen_rewards_P.detach(), rejected_rewards_P.detach()
