"""Gradient checkpointing of decoder layers.

`full` stores only a layer's input; `offload` stores it in host memory. `selective` also stores the results of large
matrix products and of attention, so that only cheap operations are recomputed: norms, rotary embeddings, activation
functions, gates, dropout, sums, and the adapter's products over its small rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from bpo.model.offload import HostInputs

# The argument whose last dimension a product sums over. Batched products (`bmm`) are excluded: inside a layer they
# occur only in attention's math fallback, and their results are quadratic in the length.
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::linear": 0, "aten::_scaled_mm": 0}
# A product over this few elements takes no longer than writing and rereading its result: 2 * 128 operations per element
# against 4 bytes, where a GPU of 2024 performs 200 to 300 operations per byte of bandwidth.
CHEAP_INNER = 128
_WHOLE = (
    "flex_attention",
    "aten::_scaled_dot_product_",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "flash_attn::",
    "flash_attn_3::",
    "torch_attn::",
    "bpo::lora_forward",  # adapted layers: products with the base's weights
)


def is_costly(op: Any, args: Sequence[Any]) -> bool:
    """Whether `selective` stores the result of an operator (a `torch._ops.OpOverload`) of a layer's forward pass."""
    matrix = _matrix_argument(op)
    return matrix is not None and (matrix < 0 or args[matrix].shape[-1] > CHEAP_INNER)


@functools.cache
def _matrix_argument(op: Any) -> int | None:
    """Index of the argument whose last dimension a product sums over; -1 if always costly, None if never."""
    schema = getattr(op, "_schema", None)  # higher-order operators have none
    if schema is not None and schema.is_mutable:
        return None  # it writes into an argument, which replaying a recorded result would not do
    name = op.name()
    return -1 if name.startswith(_WHOLE) else _PRODUCTS.get(name.split(".")[0])


class _LayerMode(TorchDispatchMode):
    """Base of both passes: compiled code, such as FlexAttention's, stays compiled and is recomputed as a whole."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Keep(_LayerMode):
    """Records the results of costly operators, in call order."""

    def __init__(self, results: dict[Any, list[Any]]):
        super().__init__()
        self.results = results
        self.record_of_storage: dict[int, tuple[list[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            self._copy_before_write(schema, args, kwargs)
        out = func(*args, **kwargs)
        if is_costly(func, args):
            recorded = self.results[func]
            # Detached, as the tensor itself will be attached to this forward pass's graph.
            recorded.append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.record_of_storage[tensor.untyped_storage()._cdata] = (recorded, len(recorded) - 1)
        return out

    def _copy_before_write(self, schema: Any, args: Any, kwargs: Any) -> None:
        """Clones recorded results that are about to be overwritten, as by the bias of DeepSpeed's ZeRO-3 linear."""
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tree_leaves(kwargs.get(argument.name, args[i] if i < len(args) else None)):
                if isinstance(tensor, torch.Tensor):
                    record = self.record_of_storage.pop(tensor.untyped_storage()._cdata, None)
                    if record is not None:
                        recorded, call = record
                        recorded[call] = tree_map_only(torch.Tensor, torch.Tensor.clone, recorded[call])


class _Replay(_LayerMode):
    """Returns each recorded result once instead of computing it; a second backward pass recomputes it."""

    def __init__(self, results: dict[Any, list[Any]]):
        super().__init__()
        self.results = results
        self.num_calls: Counter[Any] = Counter()

    def __enter__(self) -> _Replay:
        self.num_calls.clear()  # checkpoint stops early, so a pass may leave the last results unused
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_costly(func, args):
            recorded, call = self.results.get(func, []), self.num_calls[func]
            self.num_calls[func] += 1
            if call < len(recorded) and recorded[call] is not None:
                result, recorded[call] = recorded[call], None  # frees the record
                return result
        return func(*args, **(kwargs or {}))


def selective_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """The context pair for `torch.utils.checkpoint.checkpoint(context_fn=...)`, for one layer's pass.

    `create_selective_checkpoint_contexts` requires that the recomputation calls exactly the operators of the forward
    pass. Under ZeRO-3 they differ: parameters that hooks gather in one pass may already be gathered in the other.
    """
    results: dict[Any, list[Any]] = defaultdict(list)
    return _Keep(results), _Replay(results)


def _run_layer(layer: torch.nn.Module, run: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    learns = any(p.requires_grad for p in layer.parameters())
    if not learns and not any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        return function(*args)  # a frozen tower has no graph
    return run(function, *args)


def checkpoint_layers(model: Any, mode: str) -> None:
    """Enables gradient checkpointing of every layer of `model`, per `model.gradient_checkpointing`.

    Layers are set individually, because transformers' own switch also enables gradients of the embeddings, including
    the vision tower's: a frozen tower would then keep every activation and run a useless backward pass.

    Args:
        model: A transformers model.
        mode: `none`, `full`, `offload` or `selective`.

    Raises:
        ValueError: no layer of the model can be checkpointed; or `selective` with attention dropout, whose random
            numbers the recomputation would not draw, so that every later dropout of the layer had another mask.
    """
    if mode == "none":
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that support checkpointing; set model.gradient_checkpointing to none"
        )
    if mode == "selective":
        configs = [config for config in (getattr(m, "config", None) for m in model.modules()) if config is not None]
        if dropout := max((getattr(config, "attention_dropout", 0.0) or 0.0 for config in configs), default=0.0):
            raise ValueError(
                f"the model's attention_dropout is {dropout}: model.gradient_checkpointing=selective stores attention "
                "results and cannot replay the dropout; use full, or set attention_dropout to 0 in the model's config"
            )
    run: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        run = functools.partial(run, context_fn=selective_contexts)
    host = HostInputs()
    for number, layer in enumerate(layers):
        own = functools.partial(host.run, number) if mode == "offload" else run
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(_run_layer, layer, own)
