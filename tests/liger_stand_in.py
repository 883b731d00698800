"""Liger's operations in plain PyTorch, with the traits of its kernels that callers must know.

As Liger's, they overwrite inputs and gradients where Liger does, unseen by autograd and by dispatch modes. And Liger
itself in Triton's interpreter, which needs two changes for version 0.8.5.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes


def _overwrite(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), _disable_current_modes():
        target.data.copy_(values)
    return target


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, mode: str) -> torch.Tensor:
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if mode == "llama":
        return normed.to(x.dtype) * (offset + weight)
    return (normed * (offset + weight.float())).to(x.dtype)


def _norm_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        return torch.autograd.grad(_norm(x, weight, *ctx.settings), (x, weight), gradient)  # type: ignore[return-value]


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.in_place = (eps, offset, casting_mode), in_place
        return _norm(x, weight, *ctx.settings)

    @staticmethod
    def backward(ctx, gradient):
        gradient_x, gradient_weight = _norm_gradients(ctx, gradient)
        if ctx.in_place:
            gradient_x = _overwrite(gradient, gradient_x)
        return gradient_x, gradient_weight, None, None, None, None


class LigerFusedAddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset=0.0, casting_mode="llama", in_place=False):
        total = x + residual
        ctx.save_for_backward(total, weight)
        ctx.settings, ctx.in_place = (eps, offset, casting_mode), in_place
        return _norm(total, weight, *ctx.settings), total

    @staticmethod
    def backward(ctx, gradient, gradient_total):
        gradient_x, gradient_weight = _norm_gradients(ctx, gradient)
        gradient_x = gradient_x + gradient_total
        if ctx.in_place:
            gradient_x = _overwrite(gradient, gradient_x)
        return gradient_x, gradient_x, gradient_weight, None, None, None, None


def _gated(act: Any) -> tuple[Any, Any]:
    def forward(gate, up):
        return gate, up, act(gate) * up

    def backward(gate, up, gradient):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (gate, up)]
            gradients = torch.autograd.grad(act(inputs[0]) * inputs[1], inputs, gradient)
        return tuple(map(_overwrite, (gate, up), gradients))

    return forward, backward


swiglu_forward, swiglu_backward = _gated(F.silu)
geglu_forward, geglu_backward = _gated(lambda gate: F.gelu(gate, approximate="tanh"))


class LigerRopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    @staticmethod
    def backward(ctx, gradient_query, gradient_key):
        cos, sin = ctx.saved_tensors
        return _rotate(gradient_query, cos, -sin), _rotate(gradient_key, cos, -sin), None, None


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rows = heads.transpose(1, 2).contiguous()
    low, high = rows.chunk(2, dim=-1)
    turned = rows * cos[:, :, None] + torch.cat((-high, low), dim=-1) * sin[:, :, None]
    return _overwrite(rows, turned).transpose(1, 2)


def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `liger_kernel.ops` this module's functions."""
    package, ops = types.ModuleType("liger_kernel"), sys.modules[__name__]
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)


def use_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter run Liger: it passes floats as they are, and knows no functions of libdevice."""
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm, geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_float(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_float)
    for module in (rms_norm, fused_add_rms_norm):  # a lambda, as the interpreter replaces `tl.rsqrt` in its calls
        monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 1 - 2 / (tl.exp(2 * x) + 1))
