"""Inductor's lowering of packed FlexAttention for a CUDA GPU, without one: a script, for its own process.

    python tests/flex_lowering.py QUERY_HEADS KEY_HEADS [--compile]

The compiler traces forward and backward pass on the CPU, with sizes as symbols. Its graphs are then moved to fake CUDA
tensors and lowered for an H100, whose properties are pretended; with --compile the attention kernels that come out are
compiled to cubins. Prints a line of JSON per kernel. Nothing is launched, and no result is compared.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._higher_order_ops.flex_attention  # noqa: F401  the package exports a function of the module's name
import torch._inductor.config as inductor_config
import triton
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import compile_fx, scheduler
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import get_fill_order
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses import fake_tensor
from torch.nn.attention import flex_attention
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from bpo.model.attention import flex as attention_flex
from bpo_kernels.bench.aot import _nvidia_usage
from tests.attention_backends import layout_of, num_tokens

CAPABILITY, TARGET = (9, 0), GPUTarget("cuda", 90, 32)
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
LAYOUT = layout_of((62, (9, 140)), (65, (6, 21, 12)))
Graph = tuple[torch.fx.GraphModule, Sequence[Any]]


class Lowered(Exception):
    """Holds the code that Inductor generated, instead of loading it."""


def traced_graphs(heads: int, key_heads: int) -> dict[str, Graph]:
    """The graphs of a training step on the CPU, and their example inputs: fake tensors and symbols."""
    graphs: dict[str, Graph] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            def run(arguments: list[Any]) -> Any:
                return graph(*arguments)

            graphs[name] = graph, inputs
            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    compiled = torch.compile(flex_attention.flex_attention, dynamic=True, backend=backend)
    flex_attention._validate_device = lambda *tensors: None  # it rejects gradients on the CPU
    attention_flex.compiled_flex_attention = lambda: compiled
    plan = attention_flex.flex_plan(LAYOUT, torch.device("cpu"))
    qkv = [
        torch.randn(1, num_tokens(LAYOUT), count, 128, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]
    attention_flex.flex_attend(*qkv, plan).sum().backward()
    return graphs


def pretend_to_have_a_gpu() -> None:
    """Device and driver properties that Inductor queries before it generates code."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: H100
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_rng_state = lambda device="cuda": torch.empty(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device="cuda": None
    torch.cuda.device = lambda device: contextlib.nullcontext()
    cuda = device_interface.CudaInterface
    answers = {
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "get_compute_capability": 90,
        "get_device_properties": H100,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, staticmethod(lambda *_, answer=answer: answer))
    for name in ("current_device", "get_device_properties"):
        setattr(cuda.Worker, name, staticmethod(lambda *_, answer=answers[name]: answer))
    driver.set_active(SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0))
    fake_tensor.init_gpu_context = lambda device: None
    scheduler.has_triton = lambda *_: True
    for passes in (joint_graph, post_grad):
        passes.lazy_init = lambda *_: None  # patterns of other operators, traced on the device

    def permuted(output: torch.Tensor, query_strides: Sequence[int]) -> torch.Tensor:
        """FlexAttention's own, without the copy of values, for which a fake tensor queries the driver."""
        strides = module._construct_strides(output.shape, get_fill_order(query_strides))
        return output.new_empty_strided(output.shape, strides)

    module: Any = sys.modules["torch._higher_order_ops.flex_attention"]
    module._permute_strides = permuted


def lowered(graph: torch.fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> str:
    """The Python file, with Triton kernels in it, that Inductor would load for `graph` on a GPU."""

    def stop(lowering: Any) -> None:
        code = lowering.codegen()[0]
        raise Lowered(getattr(code, "value", code))

    mode: Any = detect_fake_mode(inputs)

    def moved(value: Any) -> Any:
        def to_cuda(tensor: torch.Tensor) -> torch.Tensor:
            with mode:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        return tree_map_only(torch.Tensor, to_cuda, value)

    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.update({key: moved(node.meta[key]) for key in ("val", "example_value") if key in node.meta})
    inputs = [moved(value) for value in inputs]
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = value
    GraphLowering.compile_to_module = stop
    try:
        with tracing(TracingContext(mode)), inductor_config.patch(fx_graph_cache=False, compile_threads=1):
            compile_fx.compile_fx_inner(graph, inputs, is_backward=is_backward, cudagraphs=False)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, Lowered):
                return str(cause)
            cause = cause.__cause__ or cause.__context__
        raise
    raise AssertionError("Inductor loaded its code otherwise than by compile_to_module")


def kernels_of(code: str, folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The attention kernels of Inductor's code as Triton functions, with the options that Inductor chose."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}

    def template(**options: Any) -> Callable[[Any], Any]:
        return lambda function: found.setdefault(function.__name__, (function, options))[0]

    triton_heuristics.template = template
    triton_helpers.set_driver_to_gpu = lambda: None
    for name, source in re.findall(r"async_compile\.triton\('(triton_tem_\w+)', '''(.*?)'''", code, re.DOTALL):
        path = folder / f"{name}.py"
        path.write_text(source.replace("\\'", "'"), encoding="utf-8")
        spec: Any = importlib.util.spec_from_file_location(name, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return found


def compiled_kernel(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Compiles a kernel for an H100 with Inductor's own options; returns the compiler's report."""
    meta = options["triton_meta"]
    source = ASTSource(function, dict(meta["signature"]), constexprs=dict(meta["constants"]), attrs=meta["configs"][0])
    chosen = {name: options[name] for name in ("num_warps", "num_stages")}
    kernel = triton.compile(source, target=TARGET, options=chosen)
    usage = _nvidia_usage(kernel)
    return {
        **chosen,
        "registers": usage.registers,
        "spilled_bytes": usage.spilled_bytes,
        "shared_bytes": usage.shared_bytes,
        "cubin_bytes": len(kernel.asm["cubin"]),
    }


def main(argv: list[str]) -> None:
    graphs = traced_graphs(int(argv[0]), int(argv[1]))
    pretend_to_have_a_gpu()
    with tempfile.TemporaryDirectory() as folder:
        for name, (graph, inputs) in graphs.items():
            code = lowered(graph, inputs, is_backward=name == "backward")
            for kernel, (function, options) in kernels_of(code, Path(folder)).items():
                source = (Path(folder) / f"{kernel}.py").read_text(encoding="utf-8")
                is_fixed = re.search(rf"\b{num_tokens(LAYOUT)}\b", source) is not None
                report: dict[str, Any] = {"pass": name, "kernel": kernel, "length_is_a_constant": is_fixed}
                if "--compile" in argv:
                    report |= compiled_kernel(function, options)
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
