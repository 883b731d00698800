"""The LM head in three modes: chunks of rows, tensors saved for the backward, and the GEMMs of both directions.

Legend: N rows (response tokens), n rows of one chunk, H hidden size, V vocabulary.

Triton and plain PyTorch share this code; they differ in the functions of `Rows`. With D = onehot(target) - softmax,
times the slopes of cap and scale, a loss contributes one coefficient c per row:
`grad_hidden = c * (D @ W)`, `grad_weight = D.T @ (c * hidden)`, `grad_bias = D.T @ c`. See README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import HALVES, logits_budget, statistics_dtype
from .chunks import SecondStream, overlapping_chunks, overlaps, run_chunks

# GEMMs of fewer rows underuse a GPU; if D leaves no memory for this many, it is recomputed instead.
_MIN_CHUNK_ROWS = 256
# Tile size in bytes for converting a half-precision weight to fp32 and for accumulating a weight gradient.
_TILE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Head:
    """Options of the logits `z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`."""

    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class RowOutputs:
    """Results of a pass over the logits of some rows; entropy (nats), argmax and collision only on request.

    collision_n: logarithm of the probability that two samples are equal, log sum_v p_v^2, in nats.
    """

    logp_n: Tensor
    entropy_n: Tensor | None = None
    argmax_n: Tensor | None = None
    collision_n: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """One implementation of the pass over given logits, and of the pass without logits.

    from_logits(logits_nV, target_n, head, dlogits_nV, dtype, statistics): log-probs from fp32 logits (which it may
        overwrite); D is written to `dlogits_nV` if given, which may be `logits_nV` itself. `dtype` is that of the
        hidden states and of D. The log-probs are the same with and without D.
    fused(hidden_NH, weight_VH, target_N, head, statistics, budget_bytes): log-probs without logits.
    """

    from_logits: Callable[[Tensor, Tensor, Head, Tensor | None, torch.dtype, bool], RowOutputs]
    fused: Callable[[Tensor, Tensor, Tensor, Head, bool, int], RowOutputs]


@dataclass(frozen=True)
class HeadPlan:
    """Execution plan of a call: `step` rows per chunk; what the forward saves for the backward."""

    mode: str
    step: int
    keeps_hidden_grad: bool
    keeps_dlogits: bool


def plan_head(
    mode: str,
    num_rows: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_hidden: bool,
    needs_head: bool,
    budget_bytes: int | None,
    without_gradient: str,
    num_policy: int | None = None,
) -> HeadPlan:
    """Selects mode and chunk size by the gradients needed and the memory budget.

    `auto` is `without_gradient` if nothing needs a gradient; `store` for a frozen head, which saves D @ W [N, H] and
    nothing of size V; for a trained head `store` if D of all rows and the logits of a chunk fit the budget, otherwise
    `recompute`. `num_policy` of the rows need a gradient (None: all).
    """
    budget_bytes = logits_budget(budget_bytes, device)
    logits_row = vocab * statistics_dtype(dtype).itemsize
    # D of a half-precision head is stored in addition to its fp32 logits; otherwise it replaces them.
    dlogits_row = vocab * dtype.itemsize if dtype in HALVES else 0
    gradient = needs_hidden or needs_head
    num_policy = num_rows if num_policy is None else num_policy
    kept_bytes = num_policy * (dlogits_row or logits_row)
    in_one_chunk = num_rows * logits_row + num_policy * dlogits_row <= budget_bytes
    if mode == "auto":
        chunked = kept_bytes + min(num_rows, _MIN_CHUNK_ROWS) * logits_row <= budget_bytes
        mode = without_gradient if not gradient else "store"
        if needs_head and not (in_one_chunk or chunked):
            mode = "recompute"
    keeps_dlogits = mode == "store" and needs_head
    if keeps_dlogits and in_one_chunk:
        largest = num_rows
    elif keeps_dlogits:
        largest = (budget_bytes - kept_bytes) // logits_row
    else:
        largest = budget_bytes // (logits_row + (dlogits_row if gradient else 0))
    overlap = overlaps(dtype, device)
    if overlap:
        largest //= 2  # two chunks of logits are in memory
    # Divide evenly: a last chunk of three rows would waste a GEMM.
    num_chunks = max(1, -(-num_rows // max(1, largest)), overlapping_chunks(num_rows) if overlap else 1)
    step = max(1, -(-num_rows // num_chunks))
    return HeadPlan(mode, step, mode == "store" and needs_hidden and not needs_head, keeps_dlogits)


def _cpu_multiplies() -> tuple[torch.dtype, ...]:
    """Half precisions with CPU instructions; without them GEMMs are many times slower than in fp32."""
    if not torch.backends.mkldnn.is_available():
        return ()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, native in supported.items() if native)


_CPU_MULTIPLIES = _cpu_multiplies()


def matmul(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` in their own precision, accumulated in fp32; computed in fp32 on a CPU without instructions for it."""
    if a_MK.device.type != "cpu" or a_MK.dtype not in HALVES or a_MK.dtype in _CPU_MULTIPLIES:
        return torch.mm(a_MK, b_KN) if out is None else torch.mm(a_MK, b_KN, out=out)
    total_MN = torch.zeros(a_MK.shape[0], b_KN.shape[1])
    for inner in _tiles(b_KN, total_MN.itemsize):
        total_MN.addmm_(a_MK[:, inner].float(), b_KN[inner].float())
    return total_MN.to(a_MK.dtype) if out is None else out.copy_(total_MN)


def matmul_fp32(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`a @ b` accumulated *and returned* in fp32 (fp64 for fp64), for half-precision inputs too.

    Half-precision logits would be rounded to a spacing of 0.125 between 16 and 32, an error of some tenths of a nat in
    a sequence's log-prob. On CUDA the vendor GEMM writes fp32 directly.
    """
    if a_MK.dtype not in HALVES:
        return torch.mm(a_MK, b_KN)
    if a_MK.is_cuda:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return torch.mm(a_MK.float(), b_KN.float())


def logits_fp32(hidden_nH: Tensor, weight_VH: Tensor) -> Tensor:
    """`hidden @ weight.T` in fp32; a weight in another precision than the GEMM is converted tile by tile."""
    dtype = statistics_dtype(hidden_nH.dtype)
    if hidden_nH.dtype is weight_VH.dtype and (hidden_nH.is_cuda or hidden_nH.dtype is dtype):
        return matmul_fp32(hidden_nH, weight_VH.t())
    vocab = weight_VH.shape[0]
    logits_nV = torch.empty(hidden_nH.shape[0], vocab, dtype=dtype, device=hidden_nH.device)
    for columns in _tiles(weight_VH, dtype.itemsize):
        logits_nV[:, columns] = matmul_fp32(hidden_nH, weight_VH[columns].to(hidden_nH.dtype).t())
    return logits_nV


def _tiles(weight_VH: Tensor, itemsize: int) -> list[slice]:
    vocab, hidden_size = weight_VH.shape
    tile = max(1, _TILE_BYTES.get(weight_VH.device.type, 64 << 20) // (hidden_size * itemsize))
    return [slice(start, min(start + tile, vocab)) for start in range(0, vocab, tile)]


def head_forward(
    rows: Rows,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    head: Head,
    plan: HeadPlan,
    *,
    statistics: bool = False,
    budget_bytes: int | None = None,
    num_policy: int | None = None,
) -> tuple[RowOutputs, Tensor | None, Tensor | None]:
    """Log-probs of all rows; `D @ W` [N, H] or D [N, V] of the first `num_policy` rows (None: all), as planned."""
    num_rows, hidden_size = hidden_NH.shape
    num_policy = num_rows if num_policy is None else num_policy
    weight_VH = weight_VH.to(hidden_NH.dtype)
    if plan.mode == "fused":
        budget_bytes = logits_budget(budget_bytes, hidden_NH.device)
        return rows.fused(hidden_NH, weight_VH, target_N, head, statistics, budget_bytes), None, None
    unit_grad_NH = hidden_NH.new_empty(num_policy, hidden_size) if plan.keeps_hidden_grad else None
    # Full-precision logits of a single chunk are overwritten with D.
    in_place = plan.step >= num_rows and num_policy == num_rows and hidden_NH.dtype not in HALVES
    keeps_beside = plan.keeps_dlogits and not in_place
    kept_NV = hidden_NH.new_empty(num_policy, weight_VH.shape[0]) if keeps_beside else None
    needs_d = plan.keeps_hidden_grad or plan.keeps_dlogits
    parts: list[RowOutputs] = []

    def policy_rows(chunk: slice) -> slice:
        """Rows of the chunk that need D; the rows after them belong to the reference."""
        return slice(chunk.start, max(chunk.start, min(chunk.stop, num_policy)) if needs_d else chunk.start)

    def logits(chunk: slice) -> tuple[Tensor, Tensor | None]:
        logits_nV = logits_fp32(hidden_NH[chunk], weight_VH)
        own = policy_rows(chunk)
        if own.start == own.stop:
            return logits_nV, None
        place_nV = _place_of_d(logits_nV[: own.stop - own.start], hidden_NH.dtype) if kept_NV is None else kept_NV[own]
        return logits_nV, place_nV

    def outputs(chunk: slice, made: tuple[Tensor, Tensor | None]) -> Tensor | None:
        (logits_nV, dlogits_nV), target_n = made, target_N[chunk]
        split = 0 if dlogits_nV is None else dlogits_nV.shape[0]
        for part, place_nV in ((slice(0, split), dlogits_nV), (slice(split, target_n.shape[0]), None)):
            if part.start < part.stop:
                own = (logits_nV[part], target_n[part], head, place_nV, hidden_NH.dtype, statistics)
                parts.append(rows.from_logits(*own))
        return dlogits_nV

    def finish(chunk: slice, dlogits_nV: Tensor | None) -> None:
        nonlocal kept_NV
        if dlogits_nV is None:
            return
        if unit_grad_NH is not None:
            matmul(dlogits_nV, weight_VH, out=unit_grad_NH[policy_rows(chunk)])
        elif in_place:
            kept_NV = dlogits_nV

    run_chunks(_chunks(num_rows, plan.step), logits, outputs, finish, _second_stream(hidden_NH))
    return _joined(parts, hidden_NH, statistics), unit_grad_NH, kept_NV


def _chunks(num_rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _second_stream(hidden_NH: Tensor) -> SecondStream | None:
    return SecondStream(hidden_NH.device) if overlaps(hidden_NH.dtype, hidden_NH.device) else None


def head_backward(
    rows: Rows,
    grad_logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    head: Head,
    step: int,
    unit_grad_NH: Tensor | None,
    kept_NV: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias (None if not in `needs`), from the tensors saved by `head_forward`.

    If it saved none, D is recomputed, `step` rows at a time.
    """
    num_rows, dtype = hidden_NH.shape[0], hidden_NH.dtype
    needs_hidden, needs_weight, needs_bias = needs
    if unit_grad_NH is not None:
        return (unit_grad_NH * grad_logp_N[:, None]).to(dtype), None, None
    gemm_weight_VH = weight_VH.to(dtype)
    grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
    grad_weight_VH: Tensor | None = None
    grad_bias_V = hidden_NH.new_zeros(weight_VH.shape[0], dtype=statistics_dtype(dtype)) if needs_bias else None
    step = step if kept_NV is None else max(1, num_rows)

    def logits(chunk: slice) -> tuple[Tensor | None, Tensor]:
        if kept_NV is not None:
            return None, kept_NV
        logits_nV = logits_fp32(hidden_NH[chunk], gemm_weight_VH)
        return logits_nV, _place_of_d(logits_nV, dtype)

    def derivative(chunk: slice, made: tuple[Tensor | None, Tensor]) -> Tensor:
        logits_nV, dlogits_nV = made
        if logits_nV is not None:
            rows.from_logits(logits_nV, target_N[chunk], head, dlogits_nV, dtype, False)
        return dlogits_nV

    def finish(chunk: slice, dlogits_nV: Tensor) -> None:
        nonlocal grad_weight_VH
        coefficient_n1 = grad_logp_N[chunk, None]
        if grad_hidden_NH is not None:
            grad_hidden_NH[chunk] = matmul(dlogits_nV, gemm_weight_VH) * coefficient_n1
        if needs_weight:
            # Scale the smaller operand: n x H products instead of n x V.
            scaled_nH = (coefficient_n1 * hidden_NH[chunk]).to(dtype)
            if step >= num_rows:
                grad_weight_VH = matmul(dlogits_nV.t(), scaled_nH)
            else:
                grad_weight_VH = _add_weight_gradient(grad_weight_VH, dlogits_nV, scaled_nH)
        if grad_bias_V is not None:
            grad_bias_V.add_(matmul_fp32(coefficient_n1.t().to(dtype), dlogits_nV)[0])

    run_chunks(_chunks(num_rows, step), logits, derivative, finish, _second_stream(hidden_NH))
    if needs_weight:
        grad_weight_VH = torch.zeros_like(weight_VH) if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
    if grad_bias_V is not None and head.bias_V is not None:
        grad_bias_V = grad_bias_V.to(head.bias_V.dtype)
    return grad_hidden_NH, grad_weight_VH, grad_bias_V


def _add_weight_gradient(total_VH: Tensor | None, dlogits_nV: Tensor, scaled_nH: Tensor) -> Tensor:
    """Adds a chunk's `D.T @ (c * hidden)` in fp32, tile by tile: a second [V, H] would not fit in memory."""
    if total_VH is None:
        shape = (dlogits_nV.shape[1], scaled_nH.shape[1])
        total_VH = torch.zeros(shape, dtype=statistics_dtype(scaled_nH.dtype), device=scaled_nH.device)
    for columns in _tiles(total_VH, total_VH.itemsize):
        total_VH[columns] += matmul_fp32(dlogits_nV[:, columns].t(), scaled_nH)
    return total_VH


def _place_of_d(logits_nV: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for D of these logits: new memory in half precision, the logits' own in full precision."""
    return torch.empty_like(logits_nV, dtype=dtype) if dtype in HALVES else logits_nV


def _joined(parts: list[RowOutputs], hidden_NH: Tensor, statistics: bool) -> RowOutputs:
    dtype = statistics_dtype(hidden_NH.dtype)

    def joined(pieces: list[Tensor | None], dtype: torch.dtype = dtype) -> Tensor:
        found = [piece for piece in pieces if piece is not None]
        # Without rows, an empty tensor for each output: those of a custom operation may not share their memory.
        return torch.cat(found) if found else hidden_NH.new_empty(0, dtype=dtype)

    logp_N = joined([part.logp_n for part in parts])
    if not statistics:
        return RowOutputs(logp_N)
    argmax_N = joined([part.argmax_n for part in parts], torch.int64)
    return RowOutputs(
        logp_N, joined([part.entropy_n for part in parts]), argmax_N, joined([part.collision_n for part in parts])
    )
