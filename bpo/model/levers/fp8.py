"""Frozen linear layers whose products are computed in FP8 (experimental): forward and gradient of the input.

Both factors are float8_e4m3 with one scale per row of the activations (or of their gradient) and per output feature of
the weight. Scales are powers of two: they cost no precision, as codes are floating-point numbers, and the weight's can
be moved to the gradient exactly, so that both products use the same codes.

Shape letters: T rows (tokens), O output features, I input features; R rows, C columns.
"""

from __future__ import annotations

from typing import Any

import torch

from bpo.model.levers.quantized_layers import QuantizedLinear

FORMAT = torch.float8_e4m3fn
# Both sizes of a weight must be multiples of it, for the products of CUDA.
MULTIPLE = 16
_SMALLEST = 2.0**-100


def quantize_rows(values_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns FP8 codes [R, C] and fp32 scales [R, 1], powers of two: values = codes * scales up to rounding."""
    largest_R1 = torch.linalg.vector_norm(values_RC, torch.inf, dim=1, keepdim=True).float().clamp_min_(_SMALLEST)
    exponent_R1 = torch.frexp(largest_R1 / torch.finfo(FORMAT).max).exponent
    scale_R1 = ((exponent_R1 + 127) << 23).view(torch.float32)  # 2^exponent, exactly
    return (values_RC * scale_R1.reciprocal().to(values_RC.dtype)).to(FORMAT), scale_R1


def _scaled_product(
    values: torch.Tensor, right_IO: torch.Tensor, right_scale_1O: torch.Tensor, *, fast: bool
) -> torch.Tensor:
    """`values [..., I] @ (right * right_scale)`, with values rounded to FP8.

    Args:
        right_IO: FP8 codes, the transpose of a contiguous tensor.
        fast: Whether tensor cores may sum with fewer bits between additions to fp32.
    """
    codes_TI, scale_T1 = quantize_rows(values.flatten(0, -2))
    if values.device.type == "cuda":
        output_TO = torch._scaled_mm(
            codes_TI, right_IO, scale_a=scale_T1, scale_b=right_scale_1O, out_dtype=values.dtype, use_fast_accum=fast
        )
    else:  # the same values, for tests
        output_TO = ((codes_TI.float() * scale_T1) @ (right_IO.float() * right_scale_1O)).to(values.dtype)
    return output_TO.unflatten(0, values.shape[:-1])


class Fp8Linear(QuantizedLinear):
    """Stores the codes of the weight once, as bytes; the gradient's product transposes them when it needs them."""

    scale_O: torch.Tensor

    def quantize(self, weight_OI: torch.Tensor) -> torch.Tensor:
        codes_OI, scale_O1 = quantize_rows(weight_OI)
        self.register_buffer("scale_O", scale_O1[:, 0].to(weight_OI.dtype), persistent=False)  # exact: powers of two
        return codes_OI.view(torch.uint8)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        output = _Fp8Product.apply(input, self.weight, self.scale_O)
        return output if self.bias is None else output + self.bias


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        return _scaled_product(input, weight_OI.view(FORMAT).t(), scale_O.float()[None], fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_OI, scale_O = ctx.saved_tensors
        right_OI = weight_OI.t().contiguous().view(FORMAT).t()
        ones_1I = torch.ones(1, weight_OI.shape[1], device=grad.device)
        return _scaled_product(grad * scale_O, right_OI, ones_1I, fast=False), None, None
