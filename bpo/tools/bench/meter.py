"""Measurement of one step, identical for all providers: FLOPs, positions and images, memory, time."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bpo.model.attention.flops import backward_flops, forward_flops, register_flop_formulas

KINDS = ("plain", "flops", "memory", "time")


def _attention_forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return forward_flops(math.prod(query[:-1]) * key[-2], query[-1], value[-1])


def _attention_backward(
    grad_out: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return backward_flops(math.prod(query[:-1]) * key[-2], query[-1], value[-1])


# PyTorch counts the attention kernels of GPUs but not that of CPUs. As on GPU, a causal kernel counts in full.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter:
    """Measures steps of one model.

    Args:
        model: A `*ForConditionalGeneration` model; memory is reported in excess of its parameters.
        language_module: Dotted name of its language model, whose positions are counted.
        vision_module: Dotted name of its vision tower, whose images are counted.
        device: Device of the steps.
    """

    def __init__(self, model: torch.nn.Module, language_module: str, vision_module: str, device: torch.device):
        self.device = device
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._tokens = 0
        self._images = 0
        model.get_submodule(language_module).register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        model.get_submodule(vision_module).register_forward_pre_hook(self._count_images, with_kwargs=True)

    def _count_tokens(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        tokens = given.shape[:2] if given is not None else (args[0] if args else kwargs["input_ids"]).shape
        self._tokens += tokens[0] * tokens[1]

    def _count_images(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)  # Qwen-VL: all patches in one row
        pixels = args[0] if args else kwargs["pixel_values"]
        self._images += grid.shape[0] if isinstance(grid, torch.Tensor) else pixels.shape[0]

    def release(self) -> None:
        """Returns PyTorch's cached device memory, so that another process can use it."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def measure(self, kind: str, result: dict[str, Any]) -> Iterator[None]:
        """Measures the enclosed code and stores in `result`: always `tokens` and `images`, and depending on `kind`:

        flops: `flops` of matrix products and attention, counted by `torch.utils.flop_counter.FlopCounterMode`.
        memory: `peak_bytes`: on CUDA, the peak allocation in excess of the weights; on CPU, the peak of memory
            allocated since the start, from the profiler's allocator records.
        time: `seconds`, with the device synchronized before and after.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        self._tokens = self._images = 0
        inner = {"flops": self._flops, "memory": self._memory, "time": self._time}.get(kind)
        with inner(result) if inner else contextlib.nullcontext():
            yield
        result |= {"tokens": self._tokens, "images": self._images}

    @contextlib.contextmanager
    def _flops(self, result: dict[str, Any]) -> Iterator[None]:
        register_flop_formulas()
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            yield
        result["flops"] = counter.get_total_flops()

    @contextlib.contextmanager
    def _memory(self, result: dict[str, Any]) -> Iterator[None]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            torch.cuda.synchronize(self.device)
            result["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) - self.weight_bytes
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            yield
        records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        in_use = peak = 0
        for record in sorted(records, key=lambda event: event.start_ns()):
            in_use += record.nbytes()
            peak = max(peak, in_use)
        result["peak_bytes"] = peak

    @contextlib.contextmanager
    def _time(self, result: dict[str, Any]) -> Iterator[None]:
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        result["seconds"] = time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
