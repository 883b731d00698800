"""Activation memory, traced from the model's own layers on the meta device.

No closed form covers every family, precision, adapter and kind of recomputation. Instead, a few layers run forward and
backward on meta tensors, which have no memory, while `LiveBytes` tracks every storage. All costs are affine in the
number of layers and in the number of packed tokens, so two values of each give the coefficients. docs/sizing.md derives
the closed form of a LLaMA layer; tests/tools/plan/test_activations.py compares the two.

Shape letters: B batch (1), T packed tokens, H hidden size, A heads, D head size.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bpo.model.recompute import checkpoint_layers
from bpo.tools.plan.live_bytes import LiveBytes
from bpo.tools.plan.shape import ModelShape
from bpo.training.flops import part_of

_ATTENTION = "bpo_sizing_trace"
_META = torch.device("meta")
# The points at which the affine costs are traced.
_LAYERS, _ROWS = (2, 3), (512, 1024)


@dataclass(frozen=True)
class Affine:
    """`constant + per_row * rows`, in bytes."""

    constant: float
    per_row: float

    def __call__(self, rows: float) -> float:
        return self.constant + self.per_row * rows if rows else 0.0


@dataclass(frozen=True)
class StackCosts:
    """Bytes of a stack of layers as functions of the number of rows.

    kept: live after the forward pass.
    forward: peak of the forward pass.
    backward: peak of the backward pass, without weight gradients.
    inputs_on_host: number of layers whose inputs are in host memory.
    input_per_row: bytes per row of such an input.
    """

    kept: Affine
    forward: Affine
    backward: Affine
    inputs_on_host: int = 0
    input_per_row: float = 0.0

    def offloaded(self, layers: int, input_per_row: float) -> StackCosts:
        """With the layers' inputs in host memory; on the device are that of the current layer and the next one."""
        saved = max(0, layers - 2) * input_per_row
        kept, forward, backward = (
            Affine(cost.constant, cost.per_row - saved) for cost in (self.kept, self.forward, self.backward)
        )
        return StackCosts(kept, forward, backward, layers, input_per_row)

    def host_bytes(self, rows: float) -> float:
        """Pinned host memory, whose blocks PyTorch rounds up to a power of 2."""
        size = self.input_per_row * rows
        return self.inputs_on_host * 2.0 ** math.ceil(math.log2(size)) if size else 0.0


@dataclass(frozen=True)
class ActivationCosts:
    """Costs of the language model per packed token, the vision tower per row, the projector per image token."""

    language: StackCosts
    vision: StackCosts
    projector_kept_per_row: float


class _Attention(torch.autograd.Function):
    """Saves what fused attention kernels save: q, k, v, the output and one fp32 number per row and head, no scores."""

    @staticmethod
    def forward(ctx: Any, query_BATD: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output_BATD = torch.empty_like(query_BATD)
        log_sum_BAT = query_BATD.new_empty(query_BATD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query_BATD, key, value, output_BATD, log_sum_BAT)
        return output_BATD

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    # Like `bpo.model.attention.shared_prefix`: concatenating and transposing the pieces each allocate new memory.
    joined_BATD = _Attention.apply(query, key, value).clone()
    return joined_BATD.transpose(1, 2).contiguous(), None


class _GatheredLinear(torch.autograd.Function):
    """The linear layer that DeepSpeed substitutes under ZeRO-3, to save the partitioned weight.

    It saves its input even if the weight is frozen; PyTorch's would not, for example in an adapter's base layer.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        output = x.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tuple(
            torch.empty_like(saved) if needed else None
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )


def _gpu_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout on GPU saves a byte mask; on other devices, `meta` included, PyTorch saves noise in the input's dtype."""
    return torch.native_dropout(input, p, training)[0]


@contextlib.contextmanager
def _operators_of(device: str, gathers: bool) -> Iterator[None]:
    functional = torch.nn.functional
    linear, dropout = functional.linear, functional.dropout
    if gathers:
        functional.linear = _GatheredLinear.apply
    if device == "cuda":
        functional.dropout = _gpu_dropout
    try:
        yield
    finally:
        functional.linear, functional.dropout = linear, dropout


@cache
def _register() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
    return _ATTENTION


def activation_costs(
    shape: ModelShape, checkpointing: str, *, gathers: bool = False, device: str = "cuda"
) -> ActivationCosts:
    """Traces the activation costs of a model.

    Args:
        shape: The model as it is trained.
        checkpointing: `model.gradient_checkpointing`: none, full, offload or selective.
        gathers: Whether weights are partitioned (ZeRO-3).
        device: Device type of the training run.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, family = shape.meta_model
    name = _register()
    for config in (model.config.get_text_config(), model.config.vision_config):
        config._attn_implementation = name
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = False
    checkpoint_layers(model, checkpointing)
    model.train()
    language = model.get_submodule(family.language_module)
    tower = model.get_submodule(family.vision_module)
    hidden = shape.text.hidden_size

    def text_pass(rows: int) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        embeds = torch.empty(1, rows, hidden, dtype=model.dtype, device=_META)
        # Image features are written to a copy of the embeddings.
        embeds = embeds.clone().requires_grad_(shape.flops.language.backward > 0)
        options = {
            "inputs_embeds": embeds,
            "position_ids": torch.zeros(1, rows, dtype=torch.long, device=_META),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=_META),  # 4-D: used unchanged
            "use_cache": False,
        }
        return embeds, lambda: language(**options).last_hidden_state

    layers = shape.text.num_hidden_layers
    with _operators_of(device, gathers):
        of_language = _stack_costs(model, language, "layers", layers, text_pass)
        of_vision = _vision_costs(model, tower, shape, offloads=checkpointing == "offload")
    if checkpointing == "offload":
        of_language = of_language.offloaded(layers, hidden * model.dtype.itemsize)
    return ActivationCosts(of_language, of_vision, _projector_kept(model, family, shape))


def _stack_costs(
    model: Any, owner: torch.nn.Module, attribute: str, num_layers: int, make: Callable[[int], Any]
) -> StackCosts:
    """Coefficients of `num_layers` layers, extrapolated from traces of a few layers."""
    few, more = _LAYERS if num_layers > _LAYERS[1] else (num_layers, num_layers)
    traces = {
        (count, rows): _trace(model, owner, attribute, count, rows, make) for count in {few, more} for rows in _ROWS
    }

    def fit(index: int) -> Affine:
        at_rows = []
        for rows in _ROWS:
            low, high = traces[few, rows][index], traces[more, rows][index]
            at_rows.append(low + (num_layers - few) * (high - low) / max(1, more - few))
        per_row = (at_rows[1] - at_rows[0]) / (_ROWS[1] - _ROWS[0])
        return Affine(at_rows[0] - per_row * _ROWS[0], per_row)

    return StackCosts(fit(0), fit(1), fit(2))


def _trace(
    model: Any, owner: torch.nn.Module, attribute: str, count: int, rows: int, make: Callable[[int], Any]
) -> tuple[int, int, int]:
    """Traces `count` layers of `owner`; returns (kept, forward peak, backward peak)."""
    with _first_layers(owner, attribute, count), _dropped_gradients(model):
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            _, run = make(rows)
            output = run()
            kept, forward = live.now, live.peak
            live.reset_peak()
            if output.requires_grad:
                output.backward(torch.empty_like(output))
        return kept, forward, live.peak


@contextlib.contextmanager
def _first_layers(owner: torch.nn.Module, attribute: str, count: int) -> Iterator[None]:
    whole = getattr(owner, attribute)
    setattr(owner, attribute, torch.nn.ModuleList(list(whole)[:count]))
    try:
        yield
    finally:
        setattr(owner, attribute, whole)


@contextlib.contextmanager
def _dropped_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Frees each weight gradient once it is accumulated, as ZeRO does after copying it to a bucket (counted apart)."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    learn = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(drop) for p in learn]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vision_costs(model: Any, tower: torch.nn.Module, shape: ModelShape, *, offloads: bool) -> StackCosts:
    """Costs of the tower's blocks; if the model selects a hidden state, the outputs of all blocks are kept."""
    name, blocks = max(
        ((n, m) for n, m in tower.named_modules() if isinstance(m, torch.nn.ModuleList)), key=lambda pair: len(pair[1])
    )
    vision = model.config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
    takes = inspect.signature(blocks[0].forward).parameters
    is_flat = "cu_seqlens" in takes  # Qwen: all images in one row, without a batch dimension
    keeps_outputs = getattr(model.config, "vision_feature_layer", None) is not None
    owner, _, attribute = name.rpartition(".")

    def vision_pass(rows: int) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        size = (rows, width) if is_flat else (1, rows, width)
        x = torch.empty(size, dtype=model.dtype, device=_META).clone()
        x.requires_grad_(shape.flops.vision_trained)
        options: dict[str, Any] = {}
        if is_flat:
            angles = torch.empty(rows, width // heads, device=_META)
            options = {"cu_seqlens": torch.tensor([0, rows]), "position_embeddings": (angles, angles)}
        elif "attention_mask" in takes:
            options = {"attention_mask": None}

        def run() -> torch.Tensor:
            outputs = [x]
            for block in getattr(tower.get_submodule(owner), attribute):
                result = block(outputs[-1], **options)
                outputs.append(result[0] if isinstance(result, tuple) else result)
                if not keeps_outputs:
                    del outputs[:-1]
            return torch.cat(outputs[-1:])

        return x, run

    costs = _stack_costs(model, tower.get_submodule(owner), attribute, len(blocks), vision_pass)
    # Outputs that are kept for a selection are the inputs of the blocks.
    offloads = offloads and shape.flops.vision_trained and not keeps_outputs
    return costs.offloaded(len(blocks), width * model.dtype.itemsize) if offloads else costs


def _projector_kept(model: Any, family: Any, shape: ModelShape) -> float:
    """Bytes per image token: input and output of each projector matrix, if a gradient passes through the projector."""
    matrices: Sequence[Any] = [
        p for n, p in model.named_parameters() if part_of(n, family) == "projector" and p.dim() == 2
    ]
    if not shape.flops.projector.backward:
        return 0.0
    return float(sum(sum(p.shape) * p.element_size() for p in matrices))
