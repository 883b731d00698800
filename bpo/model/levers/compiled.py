"""Decoder layers through torch.compile (`model.compile`).

Each layer is compiled alone, outside its checkpoint, and attention over packed groups interrupts it, as it reads the
layout of the batch. Layers share their compilations: one per row length (`bpo.data.row_lengths`), for training and for
passes without a gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.attention.shared_prefix import is_packed
from bpo.model.levers.choice import Lever

if TYPE_CHECKING:
    from bpo.model.load import ResolvedModel

logger = logging.getLogger(__name__)

BACKEND = "inductor"
# Half precision is rounded after each operation, as by PyTorch. Fused code would skip roundings, and others in training
# than in the reference pass, so that the policy's first log-probs differed from the reference's.
_ROUNDING = {"emulate_precision_casts": True}
# Variants of a layer per row length: with and without gradient, training and evaluation, of an input that needs no
# gradient (the first layer's); and again for the lengths of other passes than training.
_VARIANTS = 8
_ROW_LENGTHS = "num_row_lengths"


def choose(config: Config, resolved: ResolvedModel) -> Lever:
    """The value of `model.compile` for this model and device.

    Raises:
        ValueError: `layers` is requested, and rows are not packed, or checkpointing is selective, or there is no
            compiler.
    """
    if config.model.compile != "layers":
        return Lever("none", "requested" if config.model.compile == "none" else "auto: only on request")
    obstacle = _obstacle(config, resolved)
    if obstacle:
        raise ValueError(f"model.compile is layers, but {obstacle}, or set model.compile to none")
    return Lever("layers", "requested")


def _obstacle(config: Config, resolved: ResolvedModel) -> str | None:
    """Why layers cannot be compiled, and the fix."""
    if resolved.attention is None:
        return "completions do not share their prefix in rows of few lengths: set model.share_prefix to auto"
    if config.model.gradient_checkpointing == "selective":
        return (
            "model.gradient_checkpointing is selective, which cannot store results inside compiled code: set it to "
            "full, offload or none"
        )
    if resolved.device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "triton is not installed: pip install triton"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler}): install g++"


def num_row_lengths(model: Any) -> int:
    """The number of row lengths that may be compiled; 0 if no layers of `model` are, and rows need no padding."""
    return getattr(model, _ROW_LENGTHS, 0)


class CompiledLayers:
    """Runs layers of one class and one model compiled, inside `packed_layout`, and otherwise as they were.

    Operators of a dispatch mode, such as a FLOP counter, are also run uncompiled: it sees nothing of compiled code.

    Attributes:
        num_graphs: Regions between attention calls that were compiled, over all row lengths.
        seconds: Time of compilation in this process, backward passes included.
    """

    def __init__(self, layer_class: type[torch.nn.Module], number: int):
        import torch._dynamo  # seconds

        self.num_graphs, self.seconds = 0, 0.0
        self._lengths: set[int] = set()
        self._plain: Callable[..., Any] = layer_class.forward
        backend: Callable[..., Any] = torch._dynamo.lookup_backend(BACKEND)
        self._backend = functools.partial(backend, config_patches=_ROUNDING) if BACKEND == "inductor" else backend
        self._compiled = torch.compile(self._plain, backend=self._compile, dynamic=False)
        # Beyond it, a layer would silently run uncompiled.
        self._limits: dict[str, Any] = {"recompile_limit": _VARIANTS * number, "fail_on_recompile_limit_hit": True}
        self._started = self._logged_s = 0.0
        torch._dynamo.callback.on_compile_start(self._on_start)
        torch._dynamo.callback.on_compile_end(self._on_end)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return self._backend(graph, inputs)

    def _on_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _on_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started

    def __call__(self, layer: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_packed() or _get_current_dispatch_mode() is not None:
            return self._plain(layer, hidden_states, *args, **kwargs)
        with torch._dynamo.config.patch(**self._limits):
            result = self._compiled(layer, hidden_states, *args, **kwargs)
        self._lengths.add(hidden_states.shape[1])
        return result

    def log(self, *_: Any) -> None:
        """Logs what was compiled in all, if that is more than the last time; called before each batch."""
        if self.seconds != self._logged_s:
            lengths, self._logged_s = ", ".join(f"{length:,}" for length in sorted(self._lengths)), self.seconds
            text = "compiled layers: rows of %s tokens, %d graphs in %.0f s"
            logger.info(text, lengths, self.num_graphs, self.seconds)


def install(model: Any, family: Family, config: Config, lever: Lever) -> str:
    """Installs the selected value in `model`; returns what was changed, for the log."""
    if lever.value == "none":
        return ""
    from transformers.modeling_layers import GradientCheckpointingLayer

    language = model.get_submodule(family.language_module)
    layers = [module for module in language.modules() if isinstance(module, GradientCheckpointingLayer)]
    number = config.model.compile_buckets
    classes = {plain: _compiled_class(plain, CompiledLayers(plain, number)) for plain in {type(x) for x in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]
        # ZeRO-3 then gathers a layer's weights at once, outside of compiled code, instead of each submodule's inside.
        layer._z3_leaf = True
        layer.register_forward_pre_hook(_with_gradient)
    for compiled_class in classes.values():
        language.register_forward_pre_hook(compiled_class.compiled.log)
    setattr(model, _ROW_LENGTHS, number)
    return f"{len(layers)} layers, rows of up to {number} lengths"


def _with_gradient(layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Under ZeRO-3, lets a first layer's input have a gradient, whose hook frees the layer's weights.

    Otherwise, with an adapter and a frozen projector, DeepSpeed frees them before the layer's backward pass.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
    if not (partitioned and args and torch.is_grad_enabled()) or args[0].requires_grad:
        return None
    return args[0].detach().requires_grad_(), *args[1:]


def _compiled_class(plain: type[torch.nn.Module], compiled: CompiledLayers) -> Any:
    """A subclass, so that what a layer does around its forward pass, such as checkpointing it, stays."""

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"forward": forward, "compiled": compiled})
