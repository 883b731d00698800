"""Linear layers with LoRA in plain PyTorch: reference for `lora.py`, and the implementation on CPUs.

Legend: T rows, D features of the input, O of an output, R slots of all adapters' ranks side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora_operator import Group, apply_lora
from .philox import keep_mask


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
    """Linear layers with LoRA (arXiv 2106.09685, eq. 3) that have the same input, such as query, key and value.

        y_i = x W_i^T + b_i + scale_i * drop(x) A_i^T B_i^T

    `drop` is the same for all of them: inverted dropout by the mask of `philox.keep_mask`, which the backward computes
    again. Saved for the backward are x, the parameters themselves and `scale_i * drop(x) A_i^T`. Gradients exist for x,
    A and B. The arithmetic is that of the base layer's GEMM in x's dtype, with fp32 accumulators.

    Args:
        x_TD: [..., D] of any leading dimensions; fp16, bf16, fp32, in plain PyTorch also fp64.
        weights: G frozen weights [O_i, D]; 1 <= G <= 3.
        biases: G frozen biases [O_i] or None.
        lora_a: G matrices [r_i, D].
        lora_b: G matrices [O_i, r_i].
        scales: G factors of the adapters.
        dropout: probability in [0, 1) that a feature is dropped.
        seed: [1] int64 on x's device, needed with dropout; a kernel reads it, the host does not.
        stream: in [0, 2^31), separates the masks of layers that have the same seed.
        mode: how Triton adds the adapters: `fused` accumulates base and adapter in one GEMM of its own, `addmm` adds
            them to the vendor GEMM's output. The same in plain PyTorch.

    Returns:
        G outputs [..., O_i] in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or options are invalid, or a weight or bias requires a gradient.
    """
    return apply_lora(x_TD, (weights, biases, lora_a, lora_b, scales), (dropout, seed, stream, mode), triton=False)


def forward(x_TD: Tensor, group: Group, mode: str) -> list[Tensor]:
    """The outputs [T, O_i], and h [T, R]: `scale_i * drop(x) A_i^T`. `mode` makes no difference here."""
    dropped_TD = _dropped(x_TD, group)
    h_TR = x_TD.new_empty(x_TD.shape[0], group.num_slots)
    outputs = []
    for member in group.members:
        # The factors come last, so that bf16 rounds the kept features once, with the sum.
        h_Tr = (dropped_TD @ member.a_rD.t()).mul_(member.scale * group.keep_scale)
        h_TR[:, member.slot] = h_Tr
        outputs.append(F.linear(x_TD, member.weight_OD, member.bias_O).addmm_(h_Tr, member.b_Or.t()))
    return [*outputs, h_TR]


def backward(
    grads: Sequence[Tensor], x_TD: Tensor, h_TR: Tensor, group: Group, needs_x: bool, needs_adapter: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradient of x [T, D] or None, and those of every A and every B, or none."""
    grad_x_TD = torch.zeros_like(x_TD)
    lora_TD = grad_x_TD if group.seed is None else torch.zeros_like(x_TD)
    dropped_TD = _dropped(x_TD, group) if needs_adapter else x_TD
    grads_a, grads_b = [], []
    for grad_TO, member in zip(grads, group.members, strict=True):
        grad_h_Tr = (grad_TO @ member.b_Or).mul_(member.scale * group.keep_scale)
        if needs_x:
            grad_x_TD.addmm_(grad_TO, member.weight_OD)
            lora_TD.addmm_(grad_h_Tr, member.a_rD)
        if needs_adapter:
            grads_a.append(grad_h_Tr.t() @ dropped_TD)
            grads_b.append(grad_TO.t() @ h_TR[:, member.slot])
    if group.seed is not None:
        grad_x_TD += _dropped(lora_TD, group)
    return grad_x_TD if needs_x else None, grads_a + grads_b


def _dropped(x_TD: Tensor, group: Group) -> Tensor:
    """x with zeros for the features that dropout drops, without the factor of the others."""
    if group.seed is None:
        return x_TD
    num_rows, num_features = x_TD.shape
    return x_TD.where(keep_mask(num_rows, num_features, group.dropout, group.seed, group.stream), 0.0)
