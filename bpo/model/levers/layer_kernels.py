"""Norms, rotary embeddings and gated activations by Liger's kernels (`model.layer_kernels`).

A module of the language model gets a subclass of its own class, whose forward pass calls Liger's. Its parameters, names
and hooks stay, and transformers' classes, other models of the process and the vision tower are untouched. Of Liger only
these operations are used, never its losses.

Shape letters: B batch, T tokens, D hidden size, H query heads, K key heads, E head size.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import types
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.levers.choice import Lever

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel

# Text models by model type: their classes are named so in transformers, followed by RMSNorm, MLP, Attention, ...
LLAMA_KIND = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen2_5_vl_text": "Qwen2_5_VL",
    "qwen2_vl_text": "Qwen2VL",
    "qwen3": "Qwen3",
    "qwen3_vl_moe_text": "Qwen3VLMoeText",
    "qwen3_vl_text": "Qwen3VLText",
}
GEMMA_KIND = {"gemma3_text": "Gemma3"}


class _LlamaNorm:
    """RMS norm whose product with the weight is in the input's dtype; with a residual, the norm of their sum.

    Liger would write the gradient of the input into that of the output, which a residual connection shares: not here.
    """

    ops: Any
    weight: torch.nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The norm [..., D] of `hidden_states`; or that of hidden_states + residual, and this sum."""
        settings = (self.weight, self.variance_epsilon, 0.0, "llama", False)
        if residual is None:
            return self.ops.LigerRMSNormFunction.apply(hidden_states, *settings)
        return self.ops.LigerFusedAddRMSNormFunction.apply(hidden_states, residual, *settings)


class _GemmaNorm:
    """RMS norm in fp32 whose weight is stored minus 1."""

    ops: Any
    weight: torch.nn.Parameter
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.dim() == 4  # [B, H, T, E] of a [B, T, H, E]: Liger would copy it, but the norm is one of E
        x = x.transpose(1, 2) if heads else x
        x = self.ops.LigerRMSNormFunction.apply(x, self.weight, self.eps, 1.0, "gemma", False)
        return x.transpose(1, 2) if heads else x


class _GatedMLP:
    """down(act(gate(x)) * up(x)), which stores gate(x) and up(x) only."""

    act_times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_times(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class _LlamaLayer:
    """A decoder layer of Llama's kind, with the sum after attention and the norm that follows in one kernel."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        # Through the module, not its weight: ZeRO-3 gathers the weight for the module's call.
        normed, residual = self.post_attention_layernorm(attended, hidden_states)
        return residual + self.mlp(normed)  # type: ignore[no-any-return]


def _rotation(ops: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """transformers' `apply_rotary_pos_emb` for tables [B, T, E] whose halves are equal, as in all models named above.

    Channels of multimodal positions are already merged in these tables, once per forward pass of the text model.
    """

    def rotate(
        query_BHTE: torch.Tensor, key_BKTE: torch.Tensor, cos_BTE: torch.Tensor, sin_BTE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for projected in (query_BHTE, key_BKTE):
            # Liger writes into its input's memory, unseen by PyTorch. Selective recomputation may have recorded this
            # result of a matrix product: an empty write makes it copy the record first.
            projected.data[:0].zero_()
        return ops.LigerRopeFunction.apply(query_BHTE, key_BKTE, cos_BTE, sin_BTE)  # type: ignore[no-any-return]

    return rotate


def _act_times(
    forward_op: Callable[..., Any], backward_op: Callable[..., Any]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """act(gate) * up by two of Liger's functions, the second of which writes the gradients over gate and up."""

    class ActTimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            gate, up, product = forward_op(gate.contiguous(), up.contiguous())
            ctx.save_for_backward(gate, up)
            return product

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gradients = backward_op(*ctx.saved_tensors, gradient.contiguous())
            # A second backward pass over the same graph is then an error of autograd, not a wrong result.
            torch.autograd.graph.increment_version(gradients)
            return gradients  # type: ignore[no-any-return]

    return ActTimes.apply


def _rotary_forward(attention: type, rotate: Callable[..., Any]) -> Callable[..., Any] | None:
    """The forward pass of an attention class with another rotary function; None if it calls none.

    It is the same code with other globals: the class and its module stay as they are.
    """
    plain: Any = inspect.unwrap(attention.forward)  # type: ignore[attr-defined]
    if "apply_rotary_pos_emb" not in plain.__code__.co_names:
        return None
    names = {**plain.__globals__, "apply_rotary_pos_emb": rotate}
    names.pop("__name__")  # torch.compile would look names up in the module of that name instead
    function = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    function.__kwdefaults__ = plain.__kwdefaults__
    return function


def _replacement(module: torch.nn.Module, ops: Any) -> tuple[str, type] | None:
    """What a module computes, for the log, and a class that computes it with Liger; None if Liger does not know it."""
    from transformers.activations import ACT2FN

    plain = type(module)
    named = re.fullmatch(r"(\w+?)(RMSNorm|MLP|Attention|DecoderLayer)", plain.__name__)
    if named is None or not plain.__module__.startswith("transformers.models."):
        return None
    prefix, kind = named.groups()
    is_llama, is_gemma = prefix in LLAMA_KIND.values(), prefix in GEMMA_KIND.values()
    if kind == "RMSNorm" and (is_llama or is_gemma):
        return "RMSNorm", _subclass(plain, _LlamaNorm if is_llama else _GemmaNorm, ops=ops)
    if kind == "MLP" and (is_llama or is_gemma):
        for name, act, *functions in [
            ("SwiGLU", "silu", ops.swiglu_forward, ops.swiglu_backward),
            ("GeGLU", "gelu_pytorch_tanh", ops.geglu_forward, ops.geglu_backward),
        ]:
            if type(module.act_fn) is type(ACT2FN[act]):
                return name, _subclass(plain, _GatedMLP, act_times=_act_times(*functions))
    if kind == "Attention" and (is_llama or is_gemma):
        forward = _rotary_forward(plain, _rotation(ops))
        return None if forward is None else ("rotary embedding", _subclass(plain, forward=forward))
    if kind == "DecoderLayer" and is_llama:
        return "residual and norm", _subclass(plain, _LlamaLayer)
    return None


def _subclass(plain: type, *first: type, **names: Any) -> type:
    return type(plain.__name__, (*first, plain), {"__module__": __name__, **names})


def _obstacle(resolved: ResolvedModel) -> tuple[str, str] | None:
    """Why Liger cannot compute the layers of this model here, and the fix."""
    text_type = resolved.config.get_text_config().model_type
    if text_type not in LLAMA_KIND | GEMMA_KIND:
        return f"no layers of `{text_type}` are known to equal Liger's", "set it to none"
    if resolved.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Liger needs a GPU, and the device is {resolved.device.type}", "train on a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed", "pip install 'bpo[fast]'"
    return None


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `model.layer_kernels` for this model and device.

    `auto` is `none` until the tests of the bf16 path have passed on a GPU.

    Raises:
        ValueError: `liger` is requested and cannot run; gives the reason and the fix.
    """
    requested = config.model.layer_kernels
    if requested == "none":
        return Lever("none", "model.layer_kernels is none")
    obstacle = _obstacle(resolved)
    if requested == "liger":
        if obstacle is not None:
            raise ValueError(f"model.layer_kernels is liger, but {obstacle[0]}; {obstacle[1]}, or set it to auto")
        return Lever("liger", "model.layer_kernels is liger")
    return Lever(
        "none", obstacle[0] if obstacle else "auto: only on request, as its tests have not passed on a GPU yet"
    )


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Installs the selected value in `model`; returns what was changed, for the log, such as "65 RMSNorm, 32 SwiGLU".

    Names and values of parameters, hooks and gradient checkpointing of layers stay.
    """
    if lever.value == "none":
        return ""
    ops = importlib.import_module("liger_kernel.ops")
    changed: Counter[str] = Counter()
    made: dict[type, tuple[str, type] | None] = {}
    for module in model.get_submodule(family.language_module).modules():
        plain = type(module)
        if plain not in made:
            made[plain] = _replacement(module, ops)
        if (replacement := made[plain]) is not None:
            what, module.__class__ = replacement
            changed[what] += 1
    return ", ".join(f"{count} {what}" for what, count in changed.items())
