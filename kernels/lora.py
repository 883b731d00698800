"""Linear layers with LoRA on Triton: host side of `lora_kernels.py`, with the signature of `plain_lora.lora_linear`.

Legend: T rows, D features of the input, Q a quarter of them, rounded up, O of an output, r rank, R slots of all ranks.

The vendor's GEMMs compute what they compute best: the gradient of x from the frozen weights, the products of gradients
with B and h, and without dropout those with A. Kernels of our own read x with the dropout's mask, and in mode `fused`
accumulate base and adapter before the only store of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .checks import HALVES, align, check_triton_dtype
from .fused_logprob import architecture, resident_programs
from .lora_kernels import lora_down_kernel, lora_fused_kernel, lora_grad_a_kernel, lora_grad_x_kernel
from .lora_operator import Group, apply_lora
from .philox import drop_threshold

# Tiles of rows that are finished before the next ones: their x stays in the L2.
GROUP_T = 16


@dataclass(frozen=True)
class FusedConfig:
    """Tile sizes and launch options of the fused GEMM, chosen by the compiler's report (registers, spills)."""

    BLOCK_T: int
    BLOCK_O: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MaskedConfig:
    """Tile sizes and launch options of a kernel that recomputes the mask; it takes four tiles of BLOCK_Q features."""

    BLOCK_T: int
    BLOCK_Q: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


def fused_config(dtype: torch.dtype, arch: int | str) -> FusedConfig:
    """Returns the largest tiles without register spills for a compute capability, or an AMD name such as gfx942."""
    if dtype not in HALVES:
        return FusedConfig(32, 32 if arch == 100 else 64, 32, 4, 2)  # exact fp32 products do not use tensor cores
    if arch == 90:
        return FusedConfig(128, 256, 64, 8, 3)
    if arch == 100:
        return FusedConfig(128, 128, 64, 8, 4)
    return FusedConfig(128, 128, 64, 8, 3) if arch == 80 else FusedConfig(128, 64, 64, 8, 2)


def down_config(dtype: torch.dtype, num_rows: int, num_slots: int) -> MaskedConfig:
    """All slots of up to 128 in one tile, and so few rows that there are enough tiles for all multiprocessors."""
    if dtype not in HALVES:
        return MaskedConfig(32, 16, 32, 4, 2)
    rows, warps = (16, 4) if num_rows <= 4096 else (64, 8)
    return MaskedConfig(rows, 32, min(128, triton.next_power_of_2(num_slots)), warps, 2)


def grad_x_config(dtype: torch.dtype, slots: int) -> MaskedConfig:
    """`slots`: width of a member's slots."""
    return MaskedConfig(64, 64, slots, 8, 2) if dtype in HALVES else MaskedConfig(32, 32, 16, 4, 2)


def grad_a_config(dtype: torch.dtype, num_slots: int) -> MaskedConfig:
    """All slots of up to 128 in one tile."""
    if dtype not in HALVES:
        return MaskedConfig(16, 16, 32, 4, 2)
    return MaskedConfig(64, 32, min(128, triton.next_power_of_2(num_slots)), 8, 2)


def lora_linear(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    mode: str = "fused",
) -> tuple[Tensor, ...]:
    """See `plain_lora.lora_linear`.

    Raises:
        ValueError: as there; or the inputs are fp64; or mode is `fused` and a row of x is not a multiple of 16 bytes.
    """
    check_triton_dtype("x_TD", x_TD)
    row_bytes = x_TD.shape[-1] * x_TD.itemsize if x_TD.dim() else 16
    if mode == "fused" and row_bytes % 16:
        raise ValueError(
            f"mode is 'fused' but a row of x_TD has {row_bytes} bytes: its bulk copies need a multiple of 16, use "
            "mode='addmm'"
        )
    return apply_lora(x_TD, (weights, biases, lora_a, lora_b, scales), (dropout, seed, stream, mode), triton=True)


def forward(x_TD: Tensor, group: Group, mode: str) -> list[Tensor]:
    """The outputs [T, O_i], and h [T, R]."""
    x_TD, a_RD = x_TD.contiguous(), group.stacked_a().contiguous()
    h_TR = _down(x_TD, a_RD, group)
    if mode == "fused":
        return [*_fused(x_TD, h_TR, group), h_TR]
    outputs = []
    for member in group.members:
        y_TO = F.linear(x_TD, member.weight_OD, member.bias_O)
        outputs.append(y_TO.addmm_(h_TR[:, member.ranks], member.b_Or.t()))
    return [*outputs, h_TR]


def backward(
    grads: Sequence[Tensor], x_TD: Tensor, h_TR: Tensor, group: Group, needs_x: bool, needs_adapter: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradient of x [T, D] or None, and those of every A and every B, or none."""
    x_TD = x_TD.contiguous()
    grad_h_TR = torch.zeros_like(h_TR)
    for grad_TO, member in zip(grads, group.members, strict=True):
        factor = member.scale * group.keep_scale
        grad_h_Tr = grad_h_TR[:, member.ranks]
        torch.addmm(grad_h_Tr, grad_TO, member.b_Or, beta=0, alpha=factor, out=grad_h_Tr)
    grad_x_TD = _grad_x(grads, grad_h_TR, group) if needs_x else None
    if not needs_adapter:
        return grad_x_TD, []
    grad_a_RD = _grad_a(x_TD, grad_h_TR, group)
    grads_a = [grad_a_RD[member.ranks].to(x_TD.dtype, copy=True) for member in group.members]
    pairs = zip(grads, group.members, strict=True)
    return grad_x_TD, grads_a + [grad_TO.t() @ h_TR[:, member.ranks] for grad_TO, member in pairs]


def _masked(group: Group, x_TD: Tensor) -> dict[str, Any]:
    """Arguments that all kernels with a mask have."""
    features = x_TD.shape[1]
    sizes = {"T": x_TD.shape[0], "D": features, "Q": triton.cdiv(features, 4), "R": group.num_slots}
    mask = {"seed_ptr": group.seed, "mask_stream": group.stream, "threshold": drop_threshold(group.dropout)}
    return sizes | mask | {"UPCAST": _upcast(x_TD)}


def _upcast(x_TD: Tensor) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16."""
    return not x_TD.is_cuda and x_TD.dtype is torch.bfloat16


def _ends(group: Group) -> dict[str, int]:
    return {f"end_{position}": group.members[min(position, len(group.members) - 1)].slot.stop for position in (0, 1)}


def _down(x_TD: Tensor, a_RD: Tensor, group: Group) -> Tensor:
    num_rows, num_slots = x_TD.shape[0], group.num_slots
    h_TR = x_TD.new_empty(num_rows, num_slots)
    factors = [member.scale * group.keep_scale for member in group.members]
    if group.seed is None:
        if len(set(factors)) == 1:
            return torch.addmm(h_TR, x_TD, a_RD.t(), beta=0, alpha=factors[0], out=h_TR)
        for member, factor in zip(group.members, factors, strict=True):
            h_Tr = h_TR[:, member.slot]
            torch.addmm(h_Tr, x_TD, a_RD[member.slot].t(), beta=0, alpha=factor, out=h_Tr)
        return h_TR
    if num_rows == 0:
        return h_TR
    config = down_config(x_TD.dtype, num_rows, num_slots)
    scales = {f"scale_{position}": factors[min(position, len(factors) - 1)] for position in range(3)}
    grid = (triton.cdiv(num_rows, config.BLOCK_T), triton.cdiv(num_slots, config.BLOCK_R))
    with torch.cuda.device_of(x_TD):
        arguments = _masked(group, x_TD) | scales | _ends(group) | asdict(config)
        lora_down_kernel[grid](x_ptr=x_TD, a_ptr=a_RD, h_ptr=h_TR, **arguments)
    return h_TR


def _fused(x_TD: Tensor, h_TR: Tensor, group: Group) -> list[Tensor]:
    (num_rows, features), members = x_TD.shape, group.members
    outputs = [x_TD.new_empty(num_rows, member.weight_OD.shape[0]) for member in members]
    if num_rows == 0:
        return outputs
    config = fused_config(x_TD.dtype, architecture(x_TD.device))
    tensors: dict[str, Any] = {}
    tiles = 0
    for position in range(3):
        member = members[min(position, len(members) - 1)]
        b_Or = member.b_Or
        if b_Or.shape[1] * b_Or.itemsize % 16:
            b_Or = F.pad(b_Or, (0, member.slot.stop - member.ranks.stop))
        given = {
            "weight": align(member.weight_OD.contiguous()),
            "b": align(b_Or.contiguous()),
            "bias": member.bias_O,
            "y": outputs[min(position, len(members) - 1)],
        }
        present = position < len(members)
        tensors |= {f"{name}_{position}_ptr": tensor if present else None for name, tensor in given.items()}
        tensors |= {f"O_{position}": member.weight_OD.shape[0], f"r_{position}": b_Or.shape[1]}
        tiles += triton.cdiv(member.weight_OD.shape[0], config.BLOCK_O) * present
    programs = min(resident_programs(x_TD.device), triton.cdiv(num_rows, config.BLOCK_T) * tiles)
    with torch.cuda.device_of(x_TD):
        lora_fused_kernel[(programs,)](
            x_ptr=align(x_TD),
            h_ptr=h_TR,
            **tensors,
            T=num_rows,
            D=features,
            R=group.num_slots,
            **_ends(group),
            MEMBERS=len(members),
            UPCAST=_upcast(x_TD),
            GROUP_T=GROUP_T,
            BLOCK_R=group.width,
            **asdict(config),
        )
    return outputs


def _grad_x(grads: Sequence[Tensor], grad_h_TR: Tensor, group: Group) -> Tensor:
    grad_x_TD = grads[0] @ group.members[0].weight_OD
    for grad_TO, member in zip(grads[1:], group.members[1:], strict=True):
        grad_x_TD.addmm_(grad_TO, member.weight_OD)
    a_RD = group.stacked_a().contiguous()
    if group.seed is None:
        return grad_x_TD.addmm_(grad_h_TR, a_RD)
    num_rows, features = grad_x_TD.shape
    if num_rows == 0:
        return grad_x_TD
    config = grad_x_config(grad_x_TD.dtype, group.width)
    grid = (triton.cdiv(num_rows, config.BLOCK_T), triton.cdiv(triton.cdiv(features, 4), config.BLOCK_Q))
    with torch.cuda.device_of(grad_x_TD):
        arguments = _masked(group, grad_x_TD) | asdict(config)
        lora_grad_x_kernel[grid](grad_x_ptr=grad_x_TD, grad_h_ptr=grad_h_TR, a_ptr=a_RD, **arguments)
    return grad_x_TD


def _grad_a(x_TD: Tensor, grad_h_TR: Tensor, group: Group) -> Tensor:
    """[R, D]; with dropout in fp32."""
    if group.seed is None:
        return grad_h_TR.t() @ x_TD
    (num_rows, features), num_slots = x_TD.shape, group.num_slots
    config = grad_a_config(x_TD.dtype, num_slots)
    columns = triton.cdiv(triton.cdiv(features, 4), config.BLOCK_Q)
    # As many parts of the rows as give every multiprocessor a program.
    parts = min(triton.cdiv(resident_programs(x_TD.device), columns), triton.cdiv(num_rows, config.BLOCK_T))
    rows = triton.cdiv(triton.cdiv(num_rows, max(parts, 1)), config.BLOCK_T) * config.BLOCK_T
    partial_PRD = torch.empty(parts, num_slots, features, dtype=torch.float32, device=x_TD.device)
    if num_rows:
        with torch.cuda.device_of(x_TD):
            lora_grad_a_kernel[columns, parts, triton.cdiv(num_slots, config.BLOCK_R)](
                x_ptr=x_TD,
                grad_h_ptr=grad_h_TR,
                partial_ptr=partial_PRD,
                rows_per_part=rows,
                **_masked(group, x_TD),
                **asdict(config),
            )
    return partial_PRD.sum(0)
