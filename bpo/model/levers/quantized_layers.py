"""Frozen linear layers with weights of 4 or 8 bits: forward product and gradient of the input, none of the weight.

Codes are integers to PyTorch, so that neither PEFT nor DeepSpeed casts them with the floating-point weights. A weight
is reconstructed for one product and freed; its size in model.dtype is the only other memory. Products with the
reconstructed weight round as those of a plain layer do, and no row depends on the others of its batch. bitsandbytes'
own layers do not ensure that: `Linear8bitLt` on CUDA rounds activations to 8 bits, except for columns that it selects
from the whole batch, and takes another path on CPU; `Linear4bit` repacks its weights for inference on CPU.

Shape letters: T rows (tokens), O output features, I input features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

NF4_BLOCK = 64


class QuantizedLinear(torch.nn.Linear):
    """A frozen `nn.Linear` whose `weight` holds codes; made by `convert`, never by its constructor.

    Attributes:
        original_OI: The weight before quantisation, in host memory, until it is dropped.
    """

    original_OI: torch.Tensor | None = None
    _uses_original = False

    @classmethod
    def convert(cls, layer: torch.nn.Linear, device: torch.device, *, keep_original: bool) -> None:
        """Quantises the weight of a plain layer on `device`, where the codes stay, in place.

        Raises:
            ValueError: a weight is not finite.
        """
        weight_OI = layer.weight.detach()
        on_device_OI = weight_OI.to(device)
        if not torch.stack(torch.aminmax(on_device_OI)).isfinite().all():
            raise ValueError("it has values that are not finite")
        layer.__class__ = cls
        assert isinstance(layer, QuantizedLinear)
        codes = layer.quantize(on_device_OI)
        layer.weight = torch.nn.Parameter(codes, requires_grad=False)
        # For counts of weights and of their products: codes may be packed.
        layer.weight.unpacked_shape = tuple(weight_OI.shape)  # type: ignore[attr-defined]
        if keep_original:
            layer.original_OI = weight_OI

    def quantize(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Returns the codes, and keeps what else reconstructs the weight."""
        raise NotImplementedError

    def dequantized(self) -> torch.Tensor:
        """The reconstructed weight [O, I] in the data type of the original."""
        raise NotImplementedError

    def product(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self._uses_original:
            return self.product(input)
        assert self.original_OI is not None
        return F.linear(input, self.original_OI.to(input.device), self.bias)


class _Product(torch.autograd.Function):
    """`F.linear` with the reconstructed weight, which the backward pass reconstructs again."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(input, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantized(), None


class Int8Linear(QuantizedLinear):
    """Symmetric int8 with one scale per output feature: weight = code * scale, scale = max |weight| / 127."""

    scale_O1: torch.Tensor

    def quantize(self, weight_OI: torch.Tensor) -> torch.Tensor:
        largest_O1 = weight_OI.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny)
        scale_O1 = (largest_O1 / 127).to(weight_OI.dtype)
        self.register_buffer("scale_O1", scale_O1, persistent=False)
        return (weight_OI.float() / scale_O1.float()).round_().clamp_(-127, 127).to(torch.int8)

    def dequantized(self) -> torch.Tensor:
        return self.weight * self.scale_O1


class Nf4Linear(QuantizedLinear):
    """4-bit NormalFloat in blocks of 64 weights with 8-bit scales (QLoRA, arXiv 2305.14314), coded by bitsandbytes."""

    state: Any

    def quantize(self, weight_OI: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import quantize_4bit

        codes, self.state = quantize_4bit(
            weight_OI.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return codes

    def dequantized(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.state)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # The state is no buffer, which `to(bfloat16)` would round.
        super()._apply(fn, recurse)
        self.state.to(self.weight.device)
        return self


def layers_of(model: torch.nn.Module) -> list[QuantizedLinear]:
    """The quantised layers of a model."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


@contextlib.contextmanager
def original_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within, the layers multiply by their weights before quantisation, copied to the device one at a time."""
    layers = layers_of(model)
    for layer in layers:
        layer._uses_original = True
    try:
        yield
    finally:
        for layer in layers:
            layer._uses_original = False


def drop_originals(model: torch.nn.Module) -> None:
    """Frees the host memory of the weights before quantisation."""
    for layer in layers_of(model):
        layer.original_OI = None
