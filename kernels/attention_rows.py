"""In-place updates of some rows of attention results: one launch, each entry read and written once.

They are custom operators, so that selective recomputation sees that a kept result is about to be overwritten.

Legend: T packed tokens, C updated rows, H heads, D head size.
"""

# Parameters of Triton kernels are pointers and constants of its language.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile of 16 heads of 128 entries; each thread reads 16 bytes of a half-precision row at a time.
BLOCK_H, NUM_WARPS = 16, 8


@triton.jit
def merge_rows_kernel(
    out_ptr,
    lse_ptr,
    rows_ptr,
    part_ptr,
    part_lse_ptr,
    H,
    D,
    out_stride_t,
    out_stride_h,
    lse_stride_h,
    part_stride_c,
    part_stride_h,
    part_lse_stride_h,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + c).to(tl.int64)
    lse = tl.load(lse_ptr + h * lse_stride_h + row, mask=h < H, other=0.0)
    part_lse = tl.load(part_lse_ptr + h * part_lse_stride_h + c, mask=h < H, other=0.0)
    highest = tl.maximum(lse, part_lse)
    merged = highest + tl.log(tl.exp(lse - highest) + tl.exp(part_lse - highest))
    inside = (h < H)[:, None] & (d < D)[None, :]
    outputs = out_ptr + row * out_stride_t + h[:, None] * out_stride_h + d[None, :]
    out = tl.load(outputs, mask=inside, other=0.0).to(tl.float32)
    part = tl.load(part_ptr + c * part_stride_c + h[:, None] * part_stride_h + d[None, :], mask=inside, other=0.0)
    out += tl.exp(part_lse - merged)[:, None] * (part.to(tl.float32) - out)
    tl.store(outputs, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + h * lse_stride_h + row, merged, mask=h < H)


@triton.jit
def add_rows_kernel(
    total_ptr,
    rows_ptr,
    part_ptr,
    H,
    D,
    total_stride_t,
    total_stride_h,
    part_stride_c,
    part_stride_h,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + c).to(tl.int64)
    inside = (h < H)[:, None] & (d < D)[None, :]
    totals = total_ptr + row * total_stride_t + h[:, None] * total_stride_h + d[None, :]
    total = tl.load(totals, mask=inside, other=0.0).to(tl.float32)
    part = tl.load(part_ptr + c * part_stride_c + h[:, None] * part_stride_h + d[None, :], mask=inside, other=0.0)
    tl.store(totals, (total + part.to(tl.float32)).to(total_ptr.dtype.element_ty), mask=inside)


def _check_contiguous_heads(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension: make it contiguous")


@torch.library.custom_op("bpo_kernels::merge_rows", mutates_args=("out_THD", "lse_HT"))
def merge_rows(out_THD: Tensor, lse_HT: Tensor, rows_C: Tensor, part_CHD: Tensor, part_lse_HC: Tensor) -> None:
    """See `plain_rows.merge_rows`.

    Raises:
        ValueError: a last dimension is not contiguous.
    """
    _check_contiguous_heads(out_THD=out_THD, lse_HT=lse_HT, part_CHD=part_CHD, part_lse_HC=part_lse_HC)
    num_rows, heads, size = part_CHD.shape
    if not num_rows:
        return
    with torch.cuda.device_of(out_THD):
        merge_rows_kernel[(num_rows, triton.cdiv(heads, BLOCK_H))](
            out_THD,
            lse_HT,
            rows_C,
            part_CHD,
            part_lse_HC,
            heads,
            size,
            *out_THD.stride()[:2],
            lse_HT.stride(0),
            *part_CHD.stride()[:2],
            part_lse_HC.stride(0),
            BLOCK_H=BLOCK_H,
            BLOCK_D=triton.next_power_of_2(size),
            num_warps=NUM_WARPS,
        )


@torch.library.custom_op("bpo_kernels::add_rows", mutates_args=("total_THD",))
def add_rows(total_THD: Tensor, rows_C: Tensor, part_CHD: Tensor) -> None:
    """See `plain_rows.add_rows`.

    Raises:
        ValueError: a last dimension is not contiguous.
    """
    _check_contiguous_heads(total_THD=total_THD, part_CHD=part_CHD)
    num_rows, heads, size = part_CHD.shape
    if not num_rows:
        return
    with torch.cuda.device_of(total_THD):
        add_rows_kernel[(num_rows, triton.cdiv(heads, BLOCK_H))](
            total_THD,
            rows_C,
            part_CHD,
            heads,
            size,
            *total_THD.stride()[:2],
            *part_CHD.stride()[:2],
            BLOCK_H=BLOCK_H,
            BLOCK_D=triton.next_power_of_2(size),
            num_warps=NUM_WARPS,
        )
