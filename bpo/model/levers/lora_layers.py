"""PEFT's adapted linear layers, computed by one operation for all layers with the same input.

transformers calls q, k and v of attention, and gate and up of an MLP, one after the other with the same tensor. The
first of them computes the outputs of all, so that the input is read and dropped once, and the others return theirs.
Modules, parameters and their names remain PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer

from bpo.model.levers.lora import dropout_seed
from bpo_kernels.dispatch import lora_linear

# Between the dropout keys of groups, which differ in all bits: 2^64 / golden ratio.
_KEY_STEP = 0x9E3779B97F4A7C15
# Names of layers that a module calls with the same tensor, in order of the calls.
_SHARE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LayerGroup:
    """Layers with the same input, and outputs that the first has computed for the others.

    Attributes:
        layers: In order of the calls.
        mode: `fused` or `addmm`, see `lora_linear`.
    """

    def __init__(self, layers: list[GroupedLinear], mode: str):
        self.layers, self.mode = layers, mode
        self.waiting: dict[int, torch.Tensor] = {}
        self._input: torch.Tensor | None = None
        self._version, self._with_grad = 0, False

    def forget(self) -> None:
        """Drops outputs that were not asked for."""
        self.waiting, self._input = {}, None

    def bind(self, x: torch.Tensor) -> None:
        """Records the tensor that the waiting outputs were computed for."""
        if self.waiting:
            self._input, self._version, self._with_grad = x, _version(x), torch.is_grad_enabled()

    def take(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """A layer's output for `x`, once; None if it was not computed for this very tensor as it is now."""
        if x is not self._input or _version(x) != self._version or torch.is_grad_enabled() != self._with_grad:
            return None
        output = self.waiting.pop(number, None)
        if not self.waiting:
            self._input = None
        return output


def _version(x: torch.Tensor) -> int:
    """Changes when `x` is written to; tensors of inference mode and of compiled code have no such count."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


class GroupedLinear(Linear):
    """PEFT's `Linear` as a member of a `LayerGroup`.

    PEFT's own forward pass runs where it computes something else than the operation: with the adapter disabled or
    merged, with several, with a variant or a bias, with mixed dtypes, autocast, or further arguments.
    """

    group: LayerGroup
    number: int  # in the group
    dropout_key: torch.Tensor  # [1], is added to the seed; a number would make torch.compile compile each layer again

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Here rather than in `forward`, as hooks in between replace the input: those of ZeRO-3 copy it for each layer.
        if not args and not kwargs and (output := self.group.take(self.number, x)) is not None:
            return output
        output = super().__call__(x, *args, **kwargs)
        if self.number == 0:
            self.group.bind(x)
        return output  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        group, layers = self.group, [self]
        if self.number == 0:
            group.forget()
            layers = group.layers
        adapter = None if args or kwargs else self._adapter_for(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if any(layer._adapter_for(x) != adapter for layer in layers[1:]):
            layers = [self]
        name, dropout = adapter
        outputs = lora_linear(
            x,
            [layer.base_layer.weight for layer in layers],
            [layer.base_layer.bias for layer in layers],
            [layer.lora_A[name].weight for layer in layers],
            [layer.lora_B[name].weight for layer in layers],
            [layer.scaling[name] for layer in layers],
            dropout=dropout,
            seed=dropout_seed() + self.dropout_key if dropout else None,
            mode=group.mode,
        )
        if len(layers) > 1:
            group.waiting = dict(enumerate(outputs[1:], 1))
        return outputs[0]

    def _adapter_for(self, x: torch.Tensor) -> tuple[str, float] | None:
        """The adapter and its dropout probability, if the operation can compute the layer."""
        active = self.active_adapters
        if self.disable_adapters or self.merged_adapters or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name, base = active[0], self.base_layer
        if name in self.lora_variant or self.lora_bias[name] or torch.is_autocast_enabled(x.device.type):
            return None
        parameters = (base.weight, self.lora_A[name].weight, self.lora_B[name].weight)
        if base.weight.requires_grad or any(p.dtype != x.dtype for p in parameters):
            return None
        dropout = self.lora_dropout[name]
        return name, dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0

    def borrowed_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of other modules that `forward` reads."""
        for layer in self.group.layers if self.number == 0 else [self]:
            yield from layer.parameters()


def group_layers(language: torch.nn.Module, mode: str) -> str:
    """Makes the adapted layers of a language model `GroupedLinear`, in place; returns how many, for the log."""
    groups: list[LayerGroup] = []
    left = set()
    for parent in language.modules():
        children: dict[str, Any] = {n: m for n, m in parent.named_children() if isinstance(m, LoraLayer)}
        left |= {type(m.base_layer).__name__ for m in children.values() if not _is_plain(m)}
        plain = {name: layer for name, layer in children.items() if _is_plain(layer)}
        for layers in _partition(plain):
            group, key = LayerGroup(layers, mode), _signed(len(groups) * _KEY_STEP)
            groups.append(group)
            for number, layer in enumerate(layers):
                layer.__class__ = GroupedLinear  # the parameter objects stay, and with them ZeRO-3's partitions
                layer.group, layer.number = group, number
                # A buffer moves with the model; it is not in the state.
                device = layer.base_layer.weight.device
                layer.register_buffer("dropout_key", torch.tensor([key], device=device), persistent=False)

    def forget(*_: Any) -> None:
        for group in groups:
            group.forget()

    # Outputs that were not asked for, in a forward pass or a recomputation. Not on each group's module: torch.compile
    # would compile each layer again.
    language.register_forward_pre_hook(forget)
    language.register_forward_hook(forget, always_call=True)
    adapted = sum(isinstance(module, GroupedLinear) for module in language.modules())
    others = f"; PEFT computes those of {', '.join(sorted(left))}" if left else ""
    return f"{adapted} adapted layers in {len(groups)} groups with one input{others}"


def _signed(number: int) -> int:
    """The int64 with the lowest 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63


def _is_plain(layer: Any) -> bool:
    return type(layer) is Linear and type(layer.base_layer) is torch.nn.Linear


def _partition(layers: dict[str, Any]) -> Iterator[list[Any]]:
    """The adapted layers of one module by input."""
    left = dict(layers)
    for together in _SHARE_INPUT:
        shared = [layers[name] for name in together if name in layers]
        if len(shared) > 1 and len({layer.in_features for layer in shared}) == 1:  # cross-attention's may differ
            yield shared
            left = {name: layer for name, layer in left.items() if name not in together}
    yield from ([layer] for layer in left.values())
