"""Triton kernels of `lora.py`.

Legend: T rows, D features of the input, Q a quarter of them, rounded up, O of an output, R slots of all ranks.

A tile with dropout covers the features q, q + Q, q + 2 Q and q + 3 Q, which share one evaluation of Philox (as in
`philox.py`). Reductions are in a fixed order and without atomic additions, so results are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_bits(seed, row, q, mask_stream, threshold):
    """Bit i of [T, Q]: whether feature `q + i Q` of the row is kept."""
    zero = tl.zeros([row.shape[0], q.shape[0]], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + q[None, :], zero + row[:, None], zero + mask_stream, zero)
    bits = ((w0 >> 1).to(tl.int32) >= threshold).to(tl.int32)
    bits |= ((w1 >> 1).to(tl.int32) >= threshold).to(tl.int32) << 1
    bits |= ((w2 >> 1).to(tl.int32) >= threshold).to(tl.int32) << 2
    return bits | (((w3 >> 1).to(tl.int32) >= threshold).to(tl.int32) << 3)


@triton.jit
def load_kept(x_ptr, row, q, bits, part: tl.constexpr, last, D, Q, UPCAST: tl.constexpr):
    """x at the features `q + part Q` of rows before `last`, 0 where dropped."""
    d = q + part * Q
    inside = (row < last)[:, None] & ((q < Q) & (d < D))[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
    # A bitwise product: the compiler cannot bring masks of one bit into the layout of a dot product's operand.
    integer: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.float32 else tl.int16
    kept = x.to(integer, bitcast=True) & -((bits >> part) & 1).to(integer)
    x = kept.to(x_ptr.dtype.element_ty, bitcast=True)
    return x.to(tl.float32) if UPCAST else x


# Arguments that differ between layers and batches: a variant for 1 and one for multiples of 16 would be compiled. None
# is called `stream`, which Triton's launcher takes for an option of its own.
_RUNTIME = ["T", "mask_stream", "threshold", "rows_per_part"]


@triton.jit(do_not_specialize=_RUNTIME)
def lora_down_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    seed_ptr,
    T,
    D,
    Q,
    R,
    mask_stream,
    threshold,
    scale_0,
    scale_1,
    scale_2,
    end_0,
    end_1,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h = scale of the slot * drop(x) A^T."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    seed = tl.load(seed_ptr)
    h = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        bits = keep_bits(seed, row, q, mask_stream, threshold)
        for part in tl.static_range(4):
            x = load_kept(x_ptr, row, q, bits, part, T, D, Q, UPCAST)
            d = q + part * Q
            inside = (slot < R)[:, None] & ((q < Q) & (d < D))[None, :]
            a = tl.load(a_ptr + slot[:, None] * D + d[None, :], mask=inside, other=0.0)
            h = tl.dot(x, a.to(x.dtype).T, h, input_precision="ieee")
    h *= tl.where(slot < end_0, scale_0, tl.where(slot < end_1, scale_1, scale_2))[None, :]
    place = row.to(tl.int64)[:, None] * R + slot[None, :]
    tl.store(h_ptr + place, h, mask=(row < T)[:, None] & (slot < R)[None, :])


@triton.jit
def lora_tiles(
    x,
    h,
    weight,
    b,
    bias_ptr,
    y_ptr,
    first,
    last,
    first_t,
    group_t,
    start_slot,
    end_slot,
    T,
    D,
    size,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """This program's tiles of one member's output, in `group_t` tiles of rows."""
    for tile in tl.range(first, last, tl.num_programs(0)):
        start_t, start_o = (first_t + tile % group_t) * BLOCK_T, tile // group_t * BLOCK_O
        y = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for start_d in range(0, D, BLOCK_D):
            left, right = x.load([start_t, start_d]), weight.load([start_o, start_d])
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            y = tl.dot(left, right.T, y, input_precision="ieee")
        for start_r in range(start_slot, end_slot, BLOCK_R):
            left, right = h.load([start_t, start_r]), b.load([start_o, start_r - start_slot])
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            y = tl.dot(left, right.T, y, input_precision="ieee")
        row, column = start_t + tl.arange(0, BLOCK_T), start_o + tl.arange(0, BLOCK_O)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
        inside = (row < T)[:, None] & (column < size)[None, :]
        tl.store(y_ptr + row.to(tl.int64)[:, None] * size + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def lora_fused_kernel(
    x_ptr,
    h_ptr,
    weight_0_ptr,
    weight_1_ptr,
    weight_2_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    bias_0_ptr,
    bias_1_ptr,
    bias_2_ptr,
    y_0_ptr,
    y_1_ptr,
    y_2_ptr,
    T,
    D,
    R,
    O_0,
    O_1,
    O_2,
    r_0,
    r_1,
    r_2,
    end_0,
    end_1,
    MEMBERS: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = x W^T + h B^T + bias of up to three members; each accumulator takes both products before its only store.

    A persistent kernel: of GROUP_T tiles of rows, all tiles of all members come before the next rows, so that x is read
    from memory once. The members' tiles are dealt to the programs as one sequence.
    """
    x = tl.make_tensor_descriptor(x_ptr, shape=[T, D], strides=[D, 1], block_shape=[BLOCK_T, BLOCK_D])
    h = tl.make_tensor_descriptor(h_ptr, shape=[T, R], strides=[R, 1], block_shape=[BLOCK_T, BLOCK_R])
    weight_0 = tl.make_tensor_descriptor(weight_0_ptr, shape=[O_0, D], strides=[D, 1], block_shape=[BLOCK_O, BLOCK_D])
    b_0 = tl.make_tensor_descriptor(b_0_ptr, shape=[O_0, r_0], strides=[r_0, 1], block_shape=[BLOCK_O, BLOCK_R])
    if MEMBERS > 1:
        weight_1 = tl.make_tensor_descriptor(weight_1_ptr, [O_1, D], [D, 1], [BLOCK_O, BLOCK_D])
        b_1 = tl.make_tensor_descriptor(b_1_ptr, [O_1, r_1], [r_1, 1], [BLOCK_O, BLOCK_R])
    if MEMBERS > 2:
        weight_2 = tl.make_tensor_descriptor(weight_2_ptr, [O_2, D], [D, 1], [BLOCK_O, BLOCK_D])
        b_2 = tl.make_tensor_descriptor(b_2_ptr, [O_2, r_2], [r_2, 1], [BLOCK_O, BLOCK_R])
    programs, num_t = tl.num_programs(0), tl.cdiv(T, BLOCK_T)
    # The position of this program in the turns that remain after the tiles dealt so far.
    turn = tl.program_id(0)
    for first_t in range(0, num_t, GROUP_T):
        group_t = tl.minimum(num_t - first_t, GROUP_T)
        last = group_t * tl.cdiv(O_0, BLOCK_O)
        lora_tiles(
            x, h, weight_0, b_0, bias_0_ptr, y_0_ptr, turn, last, first_t, group_t, 0, end_0, T, D, O_0,
            UPCAST, BLOCK_T, BLOCK_O, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        turn = (turn + programs - last % programs) % programs
        if MEMBERS > 1:
            last = group_t * tl.cdiv(O_1, BLOCK_O)
            lora_tiles(
                x, h, weight_1, b_1, bias_1_ptr, y_1_ptr, turn, last, first_t, group_t, end_0, end_1, T, D, O_1,
                UPCAST, BLOCK_T, BLOCK_O, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            turn = (turn + programs - last % programs) % programs
        if MEMBERS > 2:
            last = group_t * tl.cdiv(O_2, BLOCK_O)
            lora_tiles(
                x, h, weight_2, b_2, bias_2_ptr, y_2_ptr, turn, last, first_t, group_t, end_1, R, T, D, O_2,
                UPCAST, BLOCK_T, BLOCK_O, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            turn = (turn + programs - last % programs) % programs


@triton.jit(do_not_specialize=_RUNTIME)
def lora_grad_x_kernel(
    grad_x_ptr,
    grad_h_ptr,
    a_ptr,
    seed_ptr,
    T,
    D,
    Q,
    R,
    mask_stream,
    threshold,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds `grad_h A` to the kept features of grad_x; R is a multiple of BLOCK_R."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bits = keep_bits(tl.load(seed_ptr), row, q, mask_stream, threshold)
    for part in tl.static_range(4):
        d = q + part * Q
        exists = ((q < Q) & (d < D))[None, :]
        added = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
        for start in range(0, R, BLOCK_R):
            slot = start + tl.arange(0, BLOCK_R)
            place = row.to(tl.int64)[:, None] * R + slot[None, :]
            grad_h = tl.load(grad_h_ptr + place, mask=(row < T)[:, None], other=0.0)
            a = tl.load(a_ptr + slot[:, None] * D + d[None, :], mask=exists, other=0.0)
            if UPCAST:
                grad_h, a = grad_h.to(tl.float32), a.to(tl.float32)
            added = tl.dot(grad_h, a, added, input_precision="ieee")
        pointer = grad_x_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
        inside = (row < T)[:, None] & exists
        before = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointer, before + tl.where(((bits >> part) & 1) != 0, added, 0.0), mask=inside)


@triton.jit
def store_grad_a(partial_ptr, grad, slot, q, part: tl.constexpr, D, Q, R):
    d = q + part * Q
    inside = (slot < R)[:, None] & ((q < Q) & (d < D))[None, :]
    place = (tl.program_id(1).to(tl.int64) * R + slot)[:, None] * D + d[None, :]
    tl.store(partial_ptr + place, grad, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def lora_grad_a_kernel(
    x_ptr,
    grad_h_ptr,
    partial_ptr,
    seed_ptr,
    T,
    D,
    Q,
    R,
    mask_stream,
    threshold,
    rows_per_part,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`grad_h^T drop(x)` of each part of the rows, [parts, R, D] in fp32."""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows_per_part
    last = tl.minimum(first + rows_per_part, T)
    seed = tl.load(seed_ptr)
    grad_0 = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    grad_1, grad_2, grad_3 = grad_0, grad_0, grad_0
    for start in range(first, last, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        place = row.to(tl.int64)[:, None] * R + slot[None, :]
        grad_h = tl.load(grad_h_ptr + place, mask=(row < last)[:, None] & (slot < R)[None, :], other=0.0)
        if UPCAST:
            grad_h = grad_h.to(tl.float32)
        bits = keep_bits(seed, row, q, mask_stream, threshold)
        x = load_kept(x_ptr, row, q, bits, 0, last, D, Q, UPCAST)
        grad_0 = tl.dot(grad_h.T, x, grad_0, input_precision="ieee")
        x = load_kept(x_ptr, row, q, bits, 1, last, D, Q, UPCAST)
        grad_1 = tl.dot(grad_h.T, x, grad_1, input_precision="ieee")
        x = load_kept(x_ptr, row, q, bits, 2, last, D, Q, UPCAST)
        grad_2 = tl.dot(grad_h.T, x, grad_2, input_precision="ieee")
        x = load_kept(x_ptr, row, q, bits, 3, last, D, Q, UPCAST)
        grad_3 = tl.dot(grad_h.T, x, grad_3, input_precision="ieee")
    store_grad_a(partial_ptr, grad_0, slot, q, 0, D, Q, R)
    store_grad_a(partial_ptr, grad_1, slot, q, 1, D, Q, R)
    store_grad_a(partial_ptr, grad_2, slot, q, 2, D, Q, R)
    store_grad_a(partial_ptr, grad_3, slot, q, 3, D, Q, R)
