"""Triton kernels of the preference loss; preference_loss.py launches them and documents their order.

Legend: N tokens, K completions, P pairs, R rows of a tile.

A completion is split into pieces of PIECE tokens, counted from its first token, so that its sum depends neither on its
position in the batch nor on the pairs that use it. Its first piece belongs to a tile of ROWS completions. Every other
piece begins in exactly one block of PIECE tokens, whose first token belongs to the same completion: one program per
block finds its piece, or that there is none, from that token's completion.

A pair's side outside the completions, such as an anchor (-1), is the constant 0: nothing is read or written for it.

Sums over the pairs of a completion are integer sums, which give the same bits in any order of the pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

# An accumulator below HALF_BROKEN has received a NaN or infinity. Valid sums stay within 2^61, see `fixed_point_bits`.
BROKEN = tl.constexpr(-3 << 61)
HALF_BROKEN = tl.constexpr(-1 << 62)
# These differ in every micro-batch: recompiling a kernel for multiples of 16 would not pay.
VARYING = ("K", "P", "bits", "num_programs", "num_peaks")


@triton.jit
def pair_loss(margin, beta, slope, LOSS_TYPE: tl.constexpr):
    """Loss of a margin and its derivative with respect to it; `slope` encodes the label smoothing."""
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
        # log(1 + small) in full precision even if 1 + small is rounded.
        rounded = 1.0 + small
        lost = rounded - 1.0
        log1p = tl.where(lost == 0.0, small, tl.log(rounded) * (small / tl.where(lost == 0.0, 1.0, lost)))
        loss = slope * x + tl.maximum(-x, 0.0) + log1p
        derivative = beta * (slope - tl.where(x > 0.0, small, 1.0) / rounded)
    return loss, derivative


@triton.jit
def pair_number(numbers_ptr, pair, exists, GIVEN: tl.constexpr):
    """The pair's own factor in fp32; 1 if there are none, and for a pair that does not exist."""
    if GIVEN:
        return tl.load(numbers_ptr + pair, mask=exists, other=1.0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def store_pair(loss_ptr, chosen_ptr, rejected_ptr, derivative_ptr, pair, exists, loss, chosen, rejected, derivative):
    tl.store(loss_ptr + pair, loss, mask=exists)
    tl.store(chosen_ptr + pair, chosen, mask=exists)
    tl.store(rejected_ptr + pair, rejected, mask=exists)
    tl.store(derivative_ptr + pair, derivative, mask=exists)


@triton.jit
def log_ratio(policy_ptr, reference_ptr, weight_ptr, token, inside, HAS_WEIGHT: tl.constexpr):
    """Weighted log-ratio of each token, 0 outside."""
    ratio = tl.load(policy_ptr + token, mask=inside, other=0.0).to(tl.float32)
    ratio -= tl.load(reference_ptr + token, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        ratio *= tl.load(weight_ptr + token, mask=inside, other=0.0).to(tl.float32)
    return ratio


@triton.jit
def sum_of_tokens(policy_ptr, reference_ptr, weight_ptr, first, last, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum of the log-ratios of tokens first <= i < last, computed by one program."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, (last - first).to(tl.int32), BLOCK_N):
        token = first + start + tl.arange(0, BLOCK_N)
        total += log_ratio(policy_ptr, reference_ptr, weight_ptr, token, token < last, HAS_WEIGHT)
    return tl.sum(total, 0)


@triton.jit
def bounds(starts_ptr, completion, exists):
    """First token of a completion and the one after its last; 0, 0 if it does not exist."""
    first = tl.load(starts_ptr + completion, mask=exists, other=0).to(tl.int64)
    last = tl.load(starts_ptr + completion + 1, mask=exists, other=0).to(tl.int64)
    return first, last


@triton.jit
def rows_of_program(completion_ptr, starts_ptr, K, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tokens of this program: in each step, row r of its tile processes COLUMNS tokens, starting at first [R].

    Returns block, completion [R], first [R], tokens from there to the piece's end [R], step. Block 0: the first pieces
    of ROWS completions, one per row. Otherwise all rows share the piece, not a completion's first, that begins in that
    block of PIECE tokens; it may be empty.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    block = tl.maximum(program - tl.cdiv(K, ROWS) + 1, 0)
    is_later = block > 0
    own = tl.load(completion_ptr + block * PIECE, mask=is_later, other=0).to(tl.int64)
    completion = tl.where(is_later, own, program * ROWS + row)
    start, end = bounds(starts_ptr, completion, (completion >= 0) & (completion < K))
    behind = tl.where(is_later, block * PIECE - start, 0)
    first = start + (behind + PIECE - 1) // PIECE * PIECE
    # A completion that begins with the block has its first piece there.
    length = tl.where(is_later & (behind == 0), 0, tl.minimum(end - first, PIECE)).to(tl.int32)
    shift = tl.where(is_later, row * COLUMNS, 0)
    return block, completion, first + shift, length - shift, tl.where(is_later, ROWS * COLUMNS, COLUMNS)


@triton.jit(do_not_specialize=VARYING)
def preference_loss_direct_kernel(
    policy_ptr,
    reference_ptr,
    pairs_ptr,
    weight_ptr,
    starts_ptr,
    loss_ptr,
    chosen_ptr,
    rejected_ptr,
    derivative_ptr,
    pair_beta_ptr,
    pair_weight_ptr,
    K,
    P,
    beta,
    slope,
    LOSS_TYPE: tl.constexpr,
    HAS_PAIR_BETA: tl.constexpr,
    HAS_PAIR_WEIGHT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For few tokens and pairs: one program per pair sums the tokens of both sides."""
    pair = tl.program_id(0).to(tl.int64)
    chosen = tl.load(pairs_ptr + 2 * pair).to(tl.int64)
    rejected = tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    first, last = bounds(starts_ptr, chosen, (chosen >= 0) & (chosen < K))
    chosen_ratio = sum_of_tokens(policy_ptr, reference_ptr, weight_ptr, first, last, HAS_WEIGHT, BLOCK_N)
    first, last = bounds(starts_ptr, rejected, (rejected >= 0) & (rejected < K))
    rejected_ratio = sum_of_tokens(policy_ptr, reference_ptr, weight_ptr, first, last, HAS_WEIGHT, BLOCK_N)
    exists = pair < P
    beta *= pair_number(pair_beta_ptr, pair, exists, HAS_PAIR_BETA)
    weight = pair_number(pair_weight_ptr, pair, exists, HAS_PAIR_WEIGHT)
    loss, derivative = pair_loss(chosen_ratio - rejected_ratio, beta, slope, LOSS_TYPE)
    rewards = (beta * chosen_ratio, beta * rejected_ratio)
    results = (weight * loss, rewards[0], rewards[1], weight * derivative)
    store_pair(loss_ptr, chosen_ptr, rejected_ptr, derivative_ptr, pair, exists, *results)


@triton.jit(do_not_specialize=VARYING)
def preference_loss_sums_kernel(
    policy_ptr,
    reference_ptr,
    completion_ptr,
    weight_ptr,
    starts_ptr,
    sums_ptr,
    K,
    HAS_WEIGHT: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Log-ratio of every piece: first pieces at sums[completion], the one that begins in block b at sums[K + b - 1]."""
    block, completion, first, length, step = rows_of_program(completion_ptr, starts_ptr, K, PIECE, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tl.max(length, 0), step):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = column < length[:, None]
        total += log_ratio(policy_ptr, reference_ptr, weight_ptr, first[:, None] + column, inside, HAS_WEIGHT)
    sums = tl.sum(total, 1)
    if block == 0:
        tl.store(sums_ptr + completion, sums, mask=completion < K)
    else:
        tl.store(sums_ptr + K + block - 1, tl.sum(sums, 0))


@triton.jit
def joined_sum(
    starts_ptr, sums_ptr, completion, exists, K, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Log-ratio [R] of completions [R]: the first piece and, for long ones, the others, stored consecutively."""
    exists = exists & (completion >= 0) & (completion < K)
    first, last = bounds(starts_ptr, completion, exists)
    total = tl.load(sums_ptr + completion, mask=exists, other=0.0)
    num_later = (tl.maximum(last - first - 1, 0) // PIECE).to(tl.int32)
    piece_ptr = sums_ptr + K + first // PIECE
    rest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tl.max(num_later, 0), COLUMNS):
        piece = start + tl.arange(0, COLUMNS)[None, :]
        rest += tl.load(piece_ptr[:, None] + piece, mask=piece < num_later[:, None], other=0.0)
    return total + tl.sum(rest, 1)


@triton.jit(do_not_specialize=VARYING)
def preference_loss_pairs_kernel(
    pairs_ptr,
    starts_ptr,
    sums_ptr,
    loss_ptr,
    chosen_ptr,
    rejected_ptr,
    derivative_ptr,
    pair_beta_ptr,
    pair_weight_ptr,
    K,
    P,
    beta,
    slope,
    LOSS_TYPE: tl.constexpr,
    HAS_PAIR_BETA: tl.constexpr,
    HAS_PAIR_WEIGHT: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Loss of a tile of pairs, from the sums of the pieces."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = pair < P
    chosen = tl.load(pairs_ptr + 2 * pair, mask=exists, other=-1).to(tl.int64)
    rejected = tl.load(pairs_ptr + 2 * pair + 1, mask=exists, other=-1).to(tl.int64)
    chosen_ratio = joined_sum(starts_ptr, sums_ptr, chosen, exists, K, PIECE, ROWS, COLUMNS)
    rejected_ratio = joined_sum(starts_ptr, sums_ptr, rejected, exists, K, PIECE, ROWS, COLUMNS)
    beta *= pair_number(pair_beta_ptr, pair, exists, HAS_PAIR_BETA)
    weight = pair_number(pair_weight_ptr, pair, exists, HAS_PAIR_WEIGHT)
    loss, derivative = pair_loss(chosen_ratio - rejected_ratio, beta, slope, LOSS_TYPE)
    rewards = (beta * chosen_ratio, beta * rejected_ratio)
    results = (weight * loss, rewards[0], rewards[1], weight * derivative)
    store_pair(loss_ptr, chosen_ptr, rejected_ptr, derivative_ptr, pair, exists, *results)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def grad_of_margin(grad_loss_ptr, grad_stride, derivative_ptr, pair, exists):
    grad = tl.load(grad_loss_ptr + pair * grad_stride, mask=exists, other=0.0)
    return grad * tl.load(derivative_ptr + pair, mask=exists, other=0.0)


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp64, built from its bits."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def unit_exponent(peak, bits):
    """Exponent of the fixed-point unit in which numbers up to `peak` take `bits` bits; fp32 numbers down to
    2^(24 - bits) of the peak are exact.
    """
    biased = tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 1)
    return biased - 126 - bits


@triton.jit
def coefficient_from_pairs(
    grad_loss_ptr, grad_stride, derivative_ptr, pairs_ptr, completion, P, bits, BLOCK_P: tl.constexpr
):
    """d loss / d log-ratio [R] of completions [R], for at most BLOCK_P pairs."""
    pair = tl.arange(0, BLOCK_P).to(tl.int64)
    exists = pair < P
    chosen = tl.load(pairs_ptr + 2 * pair, mask=exists, other=-1).to(tl.int64)
    rejected = tl.load(pairs_ptr + 2 * pair + 1, mask=exists, other=-1).to(tl.int64)
    grad = grad_of_margin(grad_loss_ptr, grad_stride, derivative_ptr, pair, exists)
    part = tl.where(chosen[None, :] == completion[:, None], grad[None, :], 0.0)
    part -= tl.where(rejected[None, :] == completion[:, None], grad[None, :], 0.0)
    finite = is_finite(part)
    exponent = unit_exponent(tl.max(tl.where(finite, tl.abs(part), 0.0), 1), bits)
    units = (tl.where(finite, part, 0.0).to(tl.float64) * power_of_two(-exponent)[:, None]).to(tl.int64)
    total = (tl.sum(units, 1).to(tl.float64) * power_of_two(exponent)).to(tl.float32)
    return tl.where(tl.min(finite.to(tl.int32), 1) > 0, total, float("nan"))


@triton.jit(do_not_specialize=VARYING)
def preference_loss_peak_kernel(
    grad_loss_ptr,
    grad_stride,
    derivative_ptr,
    peaks_ptr,
    units_ptr,
    K,
    P,
    num_programs,
    BLOCK: tl.constexpr,
):
    """Largest margin gradient in this program's share of the pairs; zeroes the accumulators."""
    program = tl.program_id(0)
    peak = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, P, num_programs * BLOCK):
        pair = start + tl.arange(0, BLOCK).to(tl.int64)
        grad = tl.abs(grad_of_margin(grad_loss_ptr, grad_stride, derivative_ptr, pair, pair < P))
        peak = tl.maximum(peak, tl.where(is_finite(grad), grad, 0.0))
    tl.store(peaks_ptr + 1 + program, tl.max(peak, 0))
    for start in range(program * BLOCK, K, num_programs * BLOCK):
        completion = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(units_ptr + completion, tl.zeros([BLOCK], tl.int64), mask=completion < K)


@triton.jit(do_not_specialize=VARYING)
def preference_loss_scatter_kernel(
    grad_loss_ptr,
    grad_stride,
    derivative_ptr,
    pairs_ptr,
    peaks_ptr,
    units_ptr,
    K,
    P,
    num_peaks,
    bits,
    BLOCK_P: tl.constexpr,
    MAX_PEAKS: tl.constexpr,
):
    """Adds each margin's gradient to both completions, as integers; stores the overall peak before the peaks."""
    index = tl.arange(0, MAX_PEAKS)
    peak = tl.max(tl.load(peaks_ptr + 1 + index, mask=index < num_peaks, other=0.0), 0)
    if tl.program_id(0) == 0:
        tl.store(peaks_ptr, peak)
    scale = power_of_two(-unit_exponent(peak, bits))
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = pair < P
    grad = grad_of_margin(grad_loss_ptr, grad_stride, derivative_ptr, pair, exists)
    finite = is_finite(grad)
    units = (tl.where(finite, grad, 0.0).to(tl.float64) * scale).to(tl.int64)
    for side in tl.static_range(2):
        completion = tl.load(pairs_ptr + 2 * pair + side, mask=exists, other=-1).to(tl.int64)
        inside = exists & (completion >= 0) & (completion < K)
        signed = units if side == 0 else -units
        tl.atomic_add(units_ptr + completion, signed, mask=inside & finite, sem="relaxed")
        broken = tl.full([BLOCK_P], BROKEN, tl.int64)
        tl.atomic_min(units_ptr + completion, broken, mask=inside & (finite == 0), sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def preference_loss_bwd_kernel(
    grad_loss_ptr,
    grad_stride,
    derivative_ptr,
    completion_ptr,
    pairs_ptr,
    weight_ptr,
    starts_ptr,
    peak_ptr,
    units_ptr,
    grad_policy_ptr,
    K,
    P,
    bits,
    DIRECT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Writes the coefficient of each completion to its tokens, piece by piece as in the forward."""
    _, completion, first, length, step = rows_of_program(completion_ptr, starts_ptr, K, PIECE, ROWS, COLUMNS)
    longest = tl.max(length, 0)
    if longest > 0:
        if DIRECT:
            coefficient = coefficient_from_pairs(
                grad_loss_ptr, grad_stride, derivative_ptr, pairs_ptr, completion, P, bits, BLOCK_P
            )
        else:
            units = tl.load(units_ptr + completion, mask=completion < K, other=0)
            size = power_of_two(unit_exponent(tl.load(peak_ptr), bits))
            coefficient = (units.to(tl.float64) * size).to(tl.float32)
            coefficient = tl.where(units < HALF_BROKEN, float("nan"), coefficient)
        for start in range(0, longest, step):
            column = start + tl.arange(0, COLUMNS)[None, :]
            token, inside = first[:, None] + column, column < length[:, None]
            grad = tl.where(inside, coefficient[:, None], 0.0)
            if HAS_WEIGHT:
                grad *= tl.load(weight_ptr + token, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_policy_ptr + token, grad.to(grad_policy_ptr.dtype.element_ty), mask=inside)
