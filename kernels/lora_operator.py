"""What both implementations of `lora_linear` share: checks, PyTorch operators, FLOPs and the autograd function.

Legend: T rows, D features of the input, O of an output, r rank of an adapter, R slots of all adapters' ranks.

Forward and backward are operators (`bpo::lora_forward`, `bpo::lora_backward`), so that torch.compile, selective
checkpointing and FLOP counters see each as one step. The ranks of the members of a group stand side by side in
matrices of R slots; for Triton each has a multiple of the tile's width, and the slots in between are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

MODES = ("fused", "addmm")
MAX_MEMBERS = 3
MAX_RANK = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Matrices = Sequence[Tensor]
Parameters = tuple[Matrices, Sequence[Tensor | None], Matrices, Matrices, Sequence[float]]


def slot_width(ranks: Sequence[int], triton: bool) -> int:
    """Slots come in multiples of this: with Triton the K of the GEMM tiles, 16 to 64."""
    return min(64, max(16, 1 << (max(ranks) - 1).bit_length())) if triton else 1


def rank_slots(ranks: Sequence[int], triton: bool) -> list[slice]:
    """The slots of each member; the ranks come first, and zeros fill them up to the width."""
    width, slots, start = slot_width(ranks, triton), [], 0
    for rank in ranks:
        slots.append(slice(start, start + -(-rank // width) * width))
        start = slots[-1].stop
    return slots


@dataclass(frozen=True)
class Member:
    """One linear layer of a group: frozen weight and bias, adapter, and the adapter's slots."""

    weight_OD: Tensor
    bias_O: Tensor | None
    a_rD: Tensor
    b_Or: Tensor
    scale: float
    slot: slice

    @property
    def ranks(self) -> slice:
        """Those of the slots that are not padding."""
        return slice(self.slot.start, self.slot.start + self.a_rD.shape[0])


@dataclass(frozen=True)
class Group:
    """Linear layers with the same input, the dropout of that input, and the number that all slots are multiples of."""

    members: tuple[Member, ...]
    dropout: float
    seed: Tensor | None
    stream: int
    width: int

    @property
    def num_slots(self) -> int:
        return self.members[-1].slot.stop

    @property
    def keep_scale(self) -> float:
        """Factor of the features that dropout keeps."""
        return 1 / (1 - self.dropout)

    def stacked_a(self) -> Tensor:
        """[R, D]: all members' A, with zeros between their ranks and the ends of their slots."""
        pieces = []
        for member in self.members:
            pieces.append(member.a_rD)
            if member.slot != member.ranks:
                padding = member.slot.stop - member.ranks.stop
                pieces.append(member.a_rD.new_zeros(padding, member.a_rD.shape[1]))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _group(parameters: Parameters, dropout: float, seed: Tensor | None, stream: int, triton: bool) -> Group:
    ranks = [a_rD.shape[0] for a_rD in parameters[2]]
    members = tuple(Member(*fields) for fields in zip(*parameters, rank_slots(ranks, triton), strict=True))
    return Group(members, dropout, seed, stream, slot_width(ranks, triton))


def apply_lora(
    x_TD: Tensor, parameters: Parameters, options: tuple[float, Tensor | None, int, str], *, triton: bool
) -> tuple[Tensor, ...]:
    """`lora_linear` of one implementation, after the checks."""
    dropout, seed, stream, mode = options
    _check_options(x_TD, dropout, seed, stream, mode)
    _check_parameters(x_TD, parameters)
    weights, biases, lora_a, lora_b, scales = parameters
    flat = (*weights, *biases, *lora_a, *lora_b)
    outputs = _LoraLinear.apply(x_TD, seed if dropout else None, (tuple(scales), dropout, stream, mode, triton), *flat)
    return tuple(outputs)


class _LoraLinear(torch.autograd.Function):
    """Saves the parameters themselves, never views: under ZeRO-3 only parameters are gathered again."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, seed: Tensor | None, options: tuple[Any, ...], *flat: Any) -> tuple[Any, ...]:
        scales, dropout, stream, mode, triton = options
        size = len(scales)
        weights, biases, lora_a, lora_b = (list(flat[start : start + size]) for start in range(0, 4 * size, size))
        numbers = (list(scales), dropout, seed, stream)
        *outputs, h_TR = torch.ops.bpo.lora_forward(x_TD, weights, biases, lora_a, lora_b, *numbers, mode, triton)
        ctx.save_for_backward(x_TD, h_TR, seed, *weights, *lora_a, *lora_b)
        ctx.options = options
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scales, dropout, stream, _, triton = ctx.options
        size = len(scales)
        x_TD, h_TR, seed, *flat = ctx.saved_tensors
        weights, lora_a, lora_b = (list(flat[start : start + size]) for start in range(0, 3 * size, size))
        needs_x, needs_adapter = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3 + 2 * size :])
        numbers = (list(scales), dropout, seed, stream)
        arguments = (list(grads), x_TD, h_TR, weights, lora_a, lora_b, *numbers, needs_x, needs_adapter, triton)
        results = torch.ops.bpo.lora_backward(*arguments)
        adapters = results[int(needs_x) :] if needs_adapter else [None] * (2 * size)
        return results[0] if needs_x else None, None, None, *[None] * (2 * size), *adapters


_NUMBERS = "float[] scales, float dropout, Tensor? seed, int stream"
torch.library.define(
    "bpo::lora_forward",
    f"(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, {_NUMBERS}, str mode, "
    "bool triton) -> Tensor[]",
)
torch.library.define(
    "bpo::lora_backward",
    f"(Tensor[] grads, Tensor x, Tensor h, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, {_NUMBERS}, "
    "bool needs_x, bool needs_adapter, bool triton) -> Tensor[]",
)


def _implementation(triton: bool) -> ModuleType:
    """Imported at the first use: both implementations import this module, and Triton may be missing."""
    if triton:
        from . import lora

        return lora
    from . import plain_lora

    return plain_lora


@torch.library.impl("bpo::lora_forward", "CompositeExplicitAutograd")
def _lora_forward(
    x: Tensor,
    weights: Matrices,
    biases: Sequence[Tensor | None],
    lora_a: Matrices,
    lora_b: Matrices,
    scales: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    stream: int,
    mode: str,
    triton: bool,
) -> list[Tensor]:
    """Outputs [..., O_i] and h [T, R], the scaled products with A."""
    group = _group((weights, biases, lora_a, lora_b, scales), dropout, seed, stream, triton)
    *outputs, h_TR = _implementation(triton).forward(x.reshape(-1, x.shape[-1]), group, mode)
    return [*(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in outputs), h_TR]


@torch.library.register_fake("bpo::lora_forward")
def _lora_forward_fake(
    x: Tensor, weights: Matrices, biases: Any, lora_a: Matrices, lora_b: Matrices, *options: Any
) -> list[Tensor]:
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    slots = rank_slots([a.shape[0] for a in lora_a], options[-1])
    return [*outputs, x.new_empty(x.numel() // x.shape[-1], slots[-1].stop)]


@torch.library.impl("bpo::lora_backward", "CompositeExplicitAutograd")
def _lora_backward(
    grads: Matrices,
    x: Tensor,
    h: Tensor,
    weights: Matrices,
    lora_a: Matrices,
    lora_b: Matrices,
    scales: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    stream: int,
    needs_x: bool,
    needs_adapter: bool,
    triton: bool,
) -> list[Tensor]:
    """Gradients of x (if needed), of every A and of every B (if needed)."""
    group = _group((weights, [None] * len(weights), lora_a, lora_b, scales), dropout, seed, stream, triton)
    flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    backward = _implementation(triton).backward
    grad_x, adapters = backward(flat, x.reshape(-1, x.shape[-1]), h, group, needs_x, needs_adapter)
    return ([] if grad_x is None else [grad_x.view(x.shape)]) + adapters


@torch.library.register_fake("bpo::lora_backward")
def _lora_backward_fake(
    grads: Matrices, x: Tensor, h: Tensor, weights: Matrices, lora_a: Matrices, lora_b: Matrices, *options: Any
) -> list[Tensor]:
    needs_x, needs_adapter = options[-3:-1]
    adapters = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in (*lora_a, *lora_b)]
    return [x.new_empty(x.shape)] * needs_x + adapters * needs_adapter


def _product_flops(tokens: int, features: int, weights: Any, lora_a: Any, base: int, adapter: int) -> int:
    outputs = [shape[0] for shape in weights]
    ranks = [shape[0] for shape in lora_a]
    products = sum(rank * (features + output) for rank, output in zip(ranks, outputs, strict=True))
    return 2 * tokens * (base * features * sum(outputs) + adapter * products)


@register_flop_formula(torch.ops.bpo.lora_forward)  # type: ignore[untyped-decorator]
def _lora_forward_flops(x: Any, weights: Any, biases: Any, lora_a: Any, *rest: Any, **_: Any) -> int:
    """Of shapes: the base layers, A and B."""
    return _product_flops(math.prod(x[:-1]), x[-1], weights, lora_a, 1, 1)


@register_flop_formula(torch.ops.bpo.lora_backward)  # type: ignore[untyped-decorator]
def _lora_backward_flops(grads: Any, x: Any, h: Any, weights: Any, lora_a: Any, *rest: Any, **_: Any) -> int:
    """Of shapes: the base layers for x alone, the adapters for x (h's gradient is needed for both), A and B."""
    needs_x, needs_adapter = rest[-3:-1]
    tokens, features = math.prod(x[:-1]), x[-1]
    outputs = sum(weight[0] * a[0] for weight, a in zip(weights, lora_a, strict=True))
    inputs = features * sum(a[0] for a in lora_a)
    base = _product_flops(tokens, features, weights, lora_a, 1, 0) if needs_x else 0
    return base + 2 * tokens * (outputs * (1 + needs_adapter) + inputs * (needs_x + needs_adapter))


def _check_options(x_TD: Tensor, dropout: float, seed: Tensor | None, stream: int, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: use one of {', '.join(MODES)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: use a probability of at least 0 and less than 1")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream is {stream}: number the layers from 0 to 2^31 - 1")
    if not dropout:
        return
    if seed is None:
        raise ValueError(f"dropout is {dropout} but seed is None: pass an int64 tensor of one element on {x_TD.device}")
    if seed.shape != (1,) or seed.dtype is not torch.int64 or seed.device != x_TD.device:
        raise ValueError(
            f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype} on {seed.device}: pass an int64 tensor of "
            f"shape (1,) on {x_TD.device}"
        )


def _check_parameters(x_TD: Tensor, parameters: Parameters) -> None:
    sizes = {len(part) for part in parameters}
    if len(sizes) > 1 or not 1 <= len(parameters[0]) <= MAX_MEMBERS:
        raise ValueError(
            f"{[len(part) for part in parameters]} weights, biases, lora_a, lora_b and scales: pass the same number "
            f"of each, 1 to {MAX_MEMBERS}"
        )
    if x_TD.dim() == 0 or x_TD.dtype not in _DTYPES:
        raise ValueError(f"x_TD has shape {tuple(x_TD.shape)} and dtype {x_TD.dtype}: pass rows of a float type")
    features = x_TD.shape[-1]
    for position, (weight, bias, a, b, _) in enumerate(zip(*parameters, strict=True)):
        frozen = {f"weights[{position}]": weight} | ({} if bias is None else {f"biases[{position}]": bias})
        for name, tensor in frozen.items():
            if tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient: only A and B are trained here, freeze it")
        for name, tensor in (frozen | {f"lora_a[{position}]": a, f"lora_b[{position}]": b}).items():
            if tensor.dtype != x_TD.dtype or tensor.device != x_TD.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, x_TD {x_TD.dtype} on {x_TD.device}: cast one of them"
                )
        if not 1 <= a.shape[0] <= MAX_RANK:
            raise ValueError(f"lora_a[{position}] has rank {a.shape[0]}: use 1 to {MAX_RANK}")
        expected = ((weight.shape[0], features), (a.shape[0], features), (weight.shape[0], a.shape[0]))
        found = tuple(tuple(tensor.shape) for tensor in (weight, a, b))
        if found != expected or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"member {position} has weight, A, B of shapes {found}, bias {None if bias is None else bias.shape}: "
                f"expected [O, {features}], [r, {features}], [O, r] and [O], as x_TD has {features} features"
            )
