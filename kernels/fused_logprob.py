"""Log-probs without logits: a persistent GEMM whose epilogue reduces each tile, and a kernel that joins the tiles.

Legend: N rows (response tokens), H hidden size, V vocabulary, T tiles of the vocabulary.

Each tile of [BLOCK_N rows, BLOCK_V columns] stores its row maxima, sums of exponentials and, on request, moments, sums
of squared exponentials and argmax in [T, N] arrays; the program whose tile contains a row's target stores that logit.
There are no atomic additions and the second kernel joins the tiles in order, so results are deterministic and do not
depend on other rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import HALVES, IGNORED_TARGET, align
from .head import Head, RowOutputs

JOIN_BLOCK_N = 16
JOIN_BLOCK_T = 64
JOIN_WARPS = 4
# Number of row tiles per pass over the whole weight: the hidden states of 2,048 rows then stay in the L2.
GROUP_N = 16
# Programs in the interpreter: few, so that tests iterate the persistent loop.
_INTERPRETER_PROGRAMS = 3


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and launch options of one GEMM, chosen by the compiler's report (registers, spills), not by timing."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int


def gemm_config(dtype: torch.dtype, num_rows: int, arch: int | str, *, descriptors: bool, capped: bool) -> GemmConfig:
    """Returns the largest tiles without register spills when all outputs are requested (report: kernels/README.md).

    Args:
        arch: compute capability (80, 90, 100) or an AMD name such as gfx942.
        descriptors: rows are loaded by bulk copies; addresses of single elements use more registers.
        capped: the logits have a bias or a cap, which use more registers.
    """
    few_rows = num_rows <= 64
    if dtype not in HALVES:
        return GemmConfig(32, 32 if capped else 64, 32, 4, 2)  # exact fp32 products do not use tensor cores
    if arch == 100:
        return GemmConfig(64 if few_rows else 128, 128, 64, 8, 4)
    if arch == 90 and not descriptors:
        return GemmConfig(64, 64, 64, 4, 4)
    if arch == 90 and few_rows:
        return GemmConfig(64, 64, 64, 4, 4) if capped else GemmConfig(64, 256, 64, 4, 3)
    if arch == 90:
        return GemmConfig(128, 128, 64, 8, 4) if capped else GemmConfig(128, 256, 64, 8, 3)
    if arch == 80 and descriptors and not capped:
        return GemmConfig(64, 128, 64, 4, 3) if few_rows else GemmConfig(128, 128, 64, 8, 3)
    return GemmConfig(128, 64, 64, 8, 2)


@triton.jit
def finish_logits(z, column, inside, bias_ptr, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """`softcap * tanh(scale * (z + bias) / softcap)`, and -inf beyond the vocabulary."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return tl.where(inside, z, -float("inf"))


@triton.jit
def fused_logprob_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    square_ptr,
    argmax_ptr,
    target_logit_ptr,
    N,
    V,
    H,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    num_n, num_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    if USE_DESCRIPTORS:
        hidden = tl.make_tensor_descriptor(hidden_ptr, shape=[N, H], strides=[H, 1], block_shape=[BLOCK_N, BLOCK_H])
        weight = tl.make_tensor_descriptor(weight_ptr, shape=[V, H], strides=[H, 1], block_shape=[BLOCK_V, BLOCK_H])
    for tile in tl.range(tl.program_id(0), num_n * num_v, tl.num_programs(0)):
        first_n = tile // (GROUP_N * num_v) * GROUP_N
        group_n = tl.minimum(num_n - first_n, GROUP_N)
        within = tile % (GROUP_N * num_v)
        tile_v = within // group_n
        start_n, start_v = (first_n + within % group_n) * BLOCK_N, tile_v * BLOCK_V
        row, column = start_n + tl.arange(0, BLOCK_N), start_v + tl.arange(0, BLOCK_V)
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start_h in range(0, H, BLOCK_H):
            if USE_DESCRIPTORS:
                x = hidden.load([start_n, start_h])
                w = weight.load([start_v, start_h])
            else:
                h = start_h + tl.arange(0, BLOCK_H)
                x = tl.load(
                    hidden_ptr + row.to(tl.int64)[:, None] * H + h[None, :],
                    mask=(row < N)[:, None] & (h < H)[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight_ptr + column.to(tl.int64)[:, None] * H + h[None, :],
                    mask=(column < V)[:, None] & (h < H)[None, :],
                    other=0.0,
                )
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            z = tl.dot(x, w.T, z, input_precision="ieee")

        inside = (column < V)[None, :]
        z = finish_logits(z, column[None, :], inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        target = tl.load(target_ptr + row, mask=row < N, other=-1).to(tl.int32)
        is_target = column[None, :] == target[:, None]
        owns = (target >= start_v) & (target < tl.minimum(start_v + BLOCK_V, V)) & (row < N)
        tl.store(target_logit_ptr + row, tl.sum(tl.where(is_target, z, 0.0), 1), mask=owns)
        tile_max = tl.max(z, 1)
        anchor = tl.where(tile_max == -float("inf"), 0.0, tile_max)
        partial = tile_v.to(tl.int64) * N + row
        tl.store(max_ptr + partial, tile_max, mask=row < N)
        if WITH_STATISTICS:
            tl.store(argmax_ptr + partial, tl.argmax(z, 1) + start_v, mask=row < N)
        z -= anchor[:, None]
        exponential = tl.exp(z)
        tl.store(sum_ptr + partial, tl.sum(exponential, 1), mask=row < N)
        if WITH_STATISTICS:
            moment = tl.sum(tl.where(exponential > 0.0, exponential * z, 0.0), 1)
            tl.store(moment_ptr + partial, moment, mask=row < N)
            tl.store(square_ptr + partial, tl.sum(exponential * exponential, 1), mask=row < N)


@triton.jit
def join_tiles_kernel(
    max_ptr,
    sum_ptr,
    moment_ptr,
    square_ptr,
    argmax_ptr,
    target_logit_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    highest_ptr,
    collision_ptr,
    N,
    V,
    T,
    IGNORED: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_max = tl.full([BLOCK_N], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    row_moment = tl.zeros([BLOCK_N], tl.float32)
    row_square = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, T, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        exists = (tile < T)[:, None] & (row < N)[None, :]
        place = tile.to(tl.int64)[:, None] * N + row[None, :]
        tile_max = tl.load(max_ptr + place, mask=exists, other=-float("inf"))
        tile_sum = tl.load(sum_ptr + place, mask=exists, other=0.0)
        block_max = tl.max(tile_max, 0)
        new_max = tl.maximum(row_max, block_max)
        anchor = tl.where(new_max == -float("inf"), 0.0, new_max)
        # Nothing to rescale in a tile of only -inf: -inf times 0 would be NaN.
        shift = tl.where(row_max == -float("inf"), 0.0, row_max - anchor)
        tile_shift = tl.where(tile_max == -float("inf"), 0.0, tile_max - anchor[None, :])
        if WITH_STATISTICS:
            tile_moment = tl.load(moment_ptr + place, mask=exists, other=0.0) + tile_shift * tile_sum
            row_moment = tl.exp(shift) * (row_moment + shift * row_sum) + tl.sum(tl.exp(tile_shift) * tile_moment, 0)
            tile_square = tl.exp(2.0 * tile_shift) * tl.load(square_ptr + place, mask=exists, other=0.0)
            row_square = tl.exp(2.0 * shift) * row_square + tl.sum(tile_square, 0)
            candidate = tl.load(argmax_ptr + place, mask=exists, other=2147483647)
            candidate = tl.where(tile_max == block_max[None, :], candidate, 2147483647)
            highest = tl.where(block_max > row_max, tl.min(candidate, 0), highest)
        row_sum = tl.exp(shift) * row_sum + tl.sum(tl.exp(tile_shift) * tile_sum, 0)
        row_max = new_max
    target = tl.load(target_ptr + row, mask=row < N, other=0).to(tl.int64)
    target_logit = tl.load(target_logit_ptr + row, mask=(row < N) & (target >= 0) & (target < V), other=float("nan"))
    log_sum = tl.log(row_sum)
    ignored = target == IGNORED
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, target_logit - row_max - log_sum), mask=row < N)
    if WITH_STATISTICS:
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_sum - row_moment / row_sum), mask=row < N)
        tl.store(highest_ptr + row, tl.where(ignored, -1, highest).to(tl.int64), mask=row < N)
        collision = tl.log(row_square) - 2.0 * log_sum
        tl.store(collision_ptr + row, tl.where(ignored, 0.0, collision), mask=row < N)


def architecture(device: torch.device) -> int | str:
    """Compute capability such as 90, or AMD's name."""
    if device.type != "cuda":
        return 90  # the interpreter runs the H100 configuration
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def uses_descriptors(hidden_NH: Tensor, weight_VH: Tensor) -> bool:
    """Whether rows meet the requirements of bulk copies: size and address are multiples of 16 bytes."""
    row_bytes = hidden_NH.shape[1] * hidden_NH.itemsize
    return row_bytes % 16 == 0 and hidden_NH.data_ptr() % 16 == 0 and weight_VH.data_ptr() % 16 == 0


def resident_programs(device: torch.device) -> int:
    """One program per multiprocessor; also sets Triton's allocator, for descriptors created on the device."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_rows(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, head: Head, statistics: bool, budget_bytes: int
) -> RowOutputs:
    """Log-probs of the targets, with `statistics` also entropy, argmax and collision.

    Uses `8 N ceil(V / BLOCK_V)` bytes of temporaries, `20 N ceil(V / BLOCK_V)` with `statistics`. `budget_bytes` is not
    used.
    """
    num_rows, vocab, device = hidden_NH.shape[0], weight_VH.shape[0], hidden_NH.device
    hidden_NH, weight_VH, target_N = hidden_NH.contiguous(), weight_VH.contiguous(), align(target_N)
    descriptors, capped = uses_descriptors(hidden_NH, weight_VH), head.bias_V is not None or head.softcap is not None
    config = gemm_config(hidden_NH.dtype, num_rows, architecture(device), descriptors=descriptors, capped=capped)
    num_tiles = triton.cdiv(vocab, config.BLOCK_V)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    logp_N, target_logit_N = torch.empty(2, num_rows, **float32)
    max_TN, sum_TN = torch.empty(2, num_tiles, num_rows, **float32)
    entropy_N = collision_N = moment_TN = square_TN = argmax_TN = highest_N = None
    if statistics:
        entropy_N, collision_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        moment_TN, square_TN = torch.empty(2, num_tiles, num_rows, **float32)
        argmax_TN = torch.empty_like(max_TN, dtype=torch.int32)
        highest_N = torch.empty_like(logp_N, dtype=torch.int64)
    outputs = RowOutputs(logp_N, entropy_N, highest_N, collision_N)
    if num_rows == 0:
        return outputs
    num_programs = min(resident_programs(device), triton.cdiv(num_rows, config.BLOCK_N) * num_tiles)
    partials = (max_TN, sum_TN, moment_TN, square_TN, argmax_TN, target_logit_N)
    with torch.cuda.device_of(hidden_NH):
        fused_logprob_kernel[(num_programs,)](
            hidden_NH,
            weight_VH,
            head.bias_V,
            target_N,
            *partials,
            num_rows,
            vocab,
            hidden_NH.shape[1],
            head.softcap or 1.0,
            head.scale,
            HAS_BIAS=head.bias_V is not None,
            HAS_SOFTCAP=head.softcap is not None,
            WITH_STATISTICS=statistics,
            USE_DESCRIPTORS=descriptors,
            # Triton's interpreter multiplies the bit patterns of bf16.
            UPCAST=not hidden_NH.is_cuda and hidden_NH.dtype is torch.bfloat16,
            GROUP_N=GROUP_N,
            **asdict(config),
        )
        join_tiles_kernel[(triton.cdiv(num_rows, JOIN_BLOCK_N),)](
            *partials,
            target_N,
            *(logp_N, entropy_N, highest_N, collision_N),
            *(num_rows, vocab, num_tiles),
            IGNORED=IGNORED_TARGET,
            WITH_STATISTICS=statistics,
            BLOCK_N=JOIN_BLOCK_N,
            BLOCK_T=JOIN_BLOCK_T,
            num_warps=JOIN_WARPS,
        )
    return outputs
