"""Log-probs, and D = onehot - softmax for the backward pass, from the fp32 logits of a chunk in one launch.

Legend: N rows (response tokens), n rows of one chunk, V vocabulary.

The kernels are memory-bound. With half-precision D a row must move 6V bytes: 4V of logits read, 2V of D written. The
softmax needs its maximum and sum before the first entry of D, so a simple second pass would read the logits from memory
again (10V). Two kernels avoid this:

- `logprob_row_kernel` keeps the whole row in registers, for rows of at most REGISTER_VOCAB entries and a head without
  bias and cap: 6V bytes.
- `logprob_rows_kernel` reads the row in tiles, then again in reverse order, because the tiles read last are still in
  the L2 cache. No more rows are in flight than fit in the L2, so that the second pass also finds the first tiles there.
  Maximum and sum are kept per lane and reduced once per row, so that no warp waits for another while it reads.

The choice depends on V, the precision and the options of the head, not on whether D is needed: the log-probs of policy
and reference come from the same sums in the same order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import HALVES, IGNORED_TARGET, align
from .fused_logprob import finish_logits
from .head import Head, RowOutputs
from .online_softmax import LOWEST, lane_moment_update, lane_softmax_update, lane_square_update

# 512 threads with 96 entries each leave enough of the 128 registers that a thread of such a block has. Unpacked fp32
# entries of D use more of them.
REGISTER_VOCAB, REGISTER_VOCAB_FP32 = 49152, 32768
# Entries per thread: of a row in registers, up to the maximum number of warps; of a tile.
REGISTER_ENTRIES = 64
STREAMED_ENTRIES = 8
TILE_V, OPTIONS_TILE_V, MIN_TILE_V = 8192, 4096, 128
# Without a GPU: few rows in flight, so that Triton's interpreter processes several rows per program.
_INTERPRETER_ROWS_IN_FLIGHT = 3


@triton.jit
def leave_row_out(dlogits_row, V, BLOCK_V: tl.constexpr):
    """Writes D = 0 for a masked row, without reading its logits."""
    for start in tl.range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        zero = tl.zeros([BLOCK_V], dlogits_row.dtype.element_ty)
        tl.store(dlogits_row + column, zero, mask=column < V)


@triton.jit
def logprob_rows_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    argmax_ptr,
    collision_ptr,
    dlogits_ptr,
    N,
    V,
    softcap,
    scale,
    IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    WITH_DLOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    num_tiles = tl.cdiv(V, BLOCK_V)
    for number in tl.range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        logits_row = logits_ptr + row * V
        target = tl.load(target_ptr + row).to(tl.int64)
        if target == IGNORED:
            tl.store(logp_ptr + row, 0.0)
            if WITH_STATISTICS:
                tl.store(entropy_ptr + row, 0.0)
                tl.store(argmax_ptr + row, -1)
                tl.store(collision_ptr + row, 0.0)
            if WITH_DLOGITS:
                leave_row_out(dlogits_ptr + row * V, V, BLOCK_V)
        else:
            in_range = (target >= 0) & (target < V)
            # Read before any reduction, which is a barrier: afterwards D may be written into the logits' own memory.
            own = tl.load(logits_row + target, mask=in_range, other=0.0).to(tl.float32)
            own = finish_logits(own, target, in_range, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
            lane_max = tl.full([BLOCK_V], LOWEST, tl.float32)
            lane_sum = tl.zeros([BLOCK_V], tl.float32)
            lane_moment = tl.zeros([BLOCK_V], tl.float32)
            lane_square = tl.zeros([BLOCK_V], tl.float32)
            lane_highest = tl.zeros([BLOCK_V], tl.int32)
            for tile in tl.range(0, num_tiles):
                column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
                inside = column < V
                z = tl.load(logits_row + column, mask=inside, other=0.0).to(tl.float32)
                z = finish_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
                if WITH_STATISTICS:
                    lane_moment = lane_moment_update(lane_max, lane_sum, lane_moment, z)
                    lane_square = lane_square_update(lane_max, lane_square, z)
                    lane_highest = tl.where(z > lane_max, column, lane_highest)
                lane_max, lane_sum = lane_softmax_update(lane_max, lane_sum, z)
            row_max = tl.max(lane_max, 0)
            lane_shift = lane_max - row_max
            row_sum = tl.sum(lane_sum * tl.exp(lane_shift), 0)
            log_sum = tl.log(row_sum)
            tl.store(logp_ptr + row, tl.where(in_range, own - row_max - log_sum, float("nan")))
            if WITH_STATISTICS:
                moment = tl.sum(tl.exp(lane_shift) * (lane_moment + lane_shift * lane_sum), 0)
                highest = tl.min(tl.where(lane_max == row_max, lane_highest, 2147483647), 0)
                tl.store(entropy_ptr + row, log_sum - moment / row_sum)
                tl.store(argmax_ptr + row, highest.to(tl.int64))
                square = tl.sum(lane_square * tl.exp(2.0 * lane_shift), 0)
                tl.store(collision_ptr + row, tl.log(square) - 2.0 * log_sum)

            if WITH_DLOGITS:
                # dlogits may be the logits' own memory: a thread reads its entries of a tile before it writes them.
                dlogits_row = dlogits_ptr + row * V
                target_column = tl.where(in_range, target, -1).to(tl.int32)
                inverse_sum = 1.0 / row_sum
                for back in tl.range(0, num_tiles):
                    column = (num_tiles - 1 - back) * BLOCK_V + tl.arange(0, BLOCK_V)
                    inside = column < V
                    # Neither D nor logits read for the last time should evict other rows' logits from the L2.
                    z = tl.load(logits_row + column, mask=inside, other=0.0, eviction_policy="evict_first")
                    z = z.to(tl.float32)
                    z = finish_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
                    dlogits = tl.where(column == target_column, 1.0, 0.0) - tl.exp(z - row_max) * inverse_sum
                    dlogits *= scale
                    if HAS_SOFTCAP:
                        dlogits *= 1.0 - (z / softcap) * (z / softcap)
                    dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
                    tl.store(dlogits_row + column, dlogits, mask=inside, eviction_policy="evict_first")


@triton.jit
def logprob_row_kernel(
    logits_ptr,
    target_ptr,
    logp_ptr,
    dlogits_ptr,
    V,
    scale,
    IGNORED: tl.constexpr,
    WITH_DLOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REST_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * V
    # Issue the large loads before waiting for the target: a block fills a multiprocessor, so no other hides the wait.
    column = tl.arange(0, BLOCK_V)
    z = tl.load(logits_row + column, eviction_policy="evict_first").to(tl.float32) * scale
    # A tensor's size is a power of two: BLOCK_V is the largest within V; a second tensor holds the rest of the row.
    if REST_V:
        rest = BLOCK_V + tl.arange(0, REST_V)
        inside_rest = rest < V
        z_rest = tl.load(logits_row + rest, mask=inside_rest, other=0.0, eviction_policy="evict_first")
        z_rest = tl.where(inside_rest, z_rest.to(tl.float32) * scale, -float("inf"))
    target = tl.load(target_ptr + row).to(tl.int64)
    in_range = (target >= 0) & (target < V)
    # Read before any reduction, which is a barrier: afterwards D may be written into the logits' own memory.
    own = tl.load(logits_row + target, mask=in_range, other=0.0).to(tl.float32) * scale
    row_max = tl.max(z, 0)
    row_sum = 0.0
    # The exponentials replace the logits, which are not needed again: there are not enough registers for both.
    if REST_V:
        row_max = tl.maximum(row_max, tl.max(z_rest, 0))
        z_rest = tl.exp(z_rest - row_max)
        row_sum = tl.sum(z_rest, 0)
    z = tl.exp(z - row_max)
    row_sum += tl.sum(z, 0)
    ignored = target == IGNORED
    logp = tl.where(in_range, own - row_max - tl.log(row_sum), float("nan"))
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, logp))
    if WITH_DLOGITS:
        if ignored:
            leave_row_out(dlogits_ptr + row * V, V, BLOCK_V)
        else:
            dlogits_row = dlogits_ptr + row * V
            share = scale / row_sum
            if REST_V:
                tl.store(dlogits_row + rest, (-share * z_rest).to(dlogits_ptr.dtype.element_ty), mask=inside_rest)
            tl.store(dlogits_row + column, (-share * z).to(dlogits_ptr.dtype.element_ty))
            # Comparing each entry with the target would use registers. The barrier orders both stores to the target.
            tl.debug_barrier()
            own_dlogit = scale - share * tl.exp(own - row_max)
            tl.store(dlogits_row + target, own_dlogit.to(dlogits_ptr.dtype.element_ty), mask=in_range)


@dataclass(frozen=True)
class RowConfig:
    """Configuration of a launch.

    BLOCK_V, REST_V: entries of the tensors that hold a row in registers; of a tile, and None, if rows are streamed.
    """

    BLOCK_V: int
    REST_V: int | None
    num_warps: int


ON_AMD = torch.version.hip is not None


def row_config(vocab: int, dtype: torch.dtype, *, plain: bool, amd: bool = ON_AMD) -> RowConfig:
    """Rows are kept in registers if a row and its D (of `dtype`) fit and there is no bias, cap or statistics (`plain`).

    On AMD rows are always streamed: a barrier does not wait for stores to memory, as `logprob_row_kernel` requires.
    """
    if plain and not amd and vocab <= (REGISTER_VOCAB if dtype in HALVES else REGISTER_VOCAB_FP32):
        block = triton.next_power_of_2(vocab + 1) // 2
        rest = triton.next_power_of_2(vocab - block) if vocab > block else 0
        return RowConfig(block, rest, _warps(block + rest, REGISTER_ENTRIES, 16))
    tile = min(TILE_V if plain else OPTIONS_TILE_V, max(MIN_TILE_V, triton.next_power_of_2(vocab)))
    # A block has at most 1,024 threads; a warp has 64 on AMD.
    return RowConfig(tile, None, _warps(tile, STREAMED_ENTRIES, 16 if amd else 32))


def _warps(entries: int, per_thread: int, most: int) -> int:
    return min(most, max(4, triton.next_power_of_2(entries // (32 * per_thread))))


@functools.cache
def _rows_in_flight(device: torch.device, row_bytes: int) -> int:
    """Number of rows whose logits fit in the L2 cache of `device`."""
    if device.type != "cuda":
        return _INTERPRETER_ROWS_IN_FLIGHT
    return max(1, torch.cuda.get_device_properties(device).L2_cache_size // row_bytes)


def moved_bytes(num_rows: int, vocab: int, dlogits_itemsize: int | None) -> int:
    """Bytes that must be moved: fp32 logits once, D once if needed (None: not), 12 for target and log-prob.

    A streamed row reads its logits twice, the second time from the L2 unless they have been evicted.
    """
    return num_rows * (vocab * (4 + (dlogits_itemsize or 0)) + 12)


def rows_from_logits(
    logits_nV: Tensor, target_n: Tensor, head: Head, dlogits_nV: Tensor | None, dtype: torch.dtype, statistics: bool
) -> RowOutputs:
    """One launch over the fp32 logits of a chunk; see `head.Rows`."""
    num_rows, vocab = logits_nV.shape
    logp_n = torch.empty(num_rows, dtype=torch.float32, device=logits_nV.device)
    entropy_n = torch.empty_like(logp_n) if statistics else None
    argmax_n = torch.empty_like(logp_n, dtype=torch.int64) if statistics else None
    collision_n = torch.empty_like(logp_n) if statistics else None
    plain = head.bias_V is None and head.softcap is None and not statistics
    config = row_config(vocab, dtype, plain=plain)
    target_n = align(target_n)
    common = {"IGNORED": IGNORED_TARGET, "WITH_DLOGITS": dlogits_nV is not None, "BLOCK_V": config.BLOCK_V}
    with torch.cuda.device_of(logits_nV):
        if config.REST_V is not None:
            logprob_row_kernel[(num_rows,)](
                logits_nV,
                target_n,
                logp_n,
                dlogits_nV,
                vocab,
                head.scale,
                REST_V=config.REST_V,
                num_warps=config.num_warps,
                **common,
            )
            return RowOutputs(logp_n)
        # Rows that are read once do not need the L2: all of them may be in flight.
        in_flight = num_rows if dlogits_nV is None else _rows_in_flight(logits_nV.device, 4 * vocab)
        logprob_rows_kernel[(min(num_rows, in_flight),)](
            logits_nV,
            head.bias_V,
            target_n,
            logp_n,
            entropy_n,
            argmax_n,
            collision_n,
            dlogits_nV,
            num_rows,
            vocab,
            head.softcap or 1.0,
            head.scale,
            HAS_BIAS=head.bias_V is not None,
            HAS_SOFTCAP=head.softcap is not None,
            WITH_STATISTICS=statistics,
            num_warps=config.num_warps,
            **common,
        )
    return RowOutputs(logp_n, entropy_n, argmax_n, collision_n)
