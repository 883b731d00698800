"""One oracle and one table of tolerances for every kernel test.

The operation tests (test_logprob_gather.py, test_linear_logprob.py, test_preference_loss.py) call the public operations
of `bpo_kernels.dispatch`. Run as they are, they test plain PyTorch. test_triton_interpreter.py runs them once more with
BPO_KERNELS=triton in Triton's interpreter, and tests/gpu/test_kernels_gpu.py with Triton on the GPU
(KERNEL_TEST_DEVICE=cuda).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bpo_kernels import preference_sizes

# Allowed rounding in addition to the error of the same computation in eager PyTorch, relative to the largest true
# value: (of a log-prob, of a gradient). Log-probs are fp32 whatever the inputs; a half-precision gradient is rounded
# once as D, once as its product, once after its coefficient.
EPSILON = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (1e-6, 3e-6),
    torch.bfloat16: (1e-6, 6e-3),
    torch.float16: (1e-6, 8e-4),
}

Operation = Callable[..., Tensor]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("KERNEL_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def on_triton() -> bool:
    return os.environ.get("BPO_KERNELS") == "triton"


@pytest.fixture(scope="session", autouse=True)
def patch_triton_language_once_per_launch() -> Iterator[None]:
    """Triton's interpreter patches triton.language at every call of a device function: 40 % of its time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    original, tl = interpreter._patch_lang, interpreter.tl
    patched: set[tuple[bool, bool]] = set()

    def patch_lang(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        key, outermost = (tl in modules, tl.core in modules), not patched
        if key in patched:
            return interpreter._LangPatchScope()
        patched.add(key)
        scope = original(function)
        if outermost:  # the launch; its end undoes the patches
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang
    yield
    interpreter._patch_lang = original


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an output that a kernel does not write fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["few", "many"])
def path(request, monkeypatch) -> str:
    """`many`: the kernels for many tokens and pairs, with pieces of 64 tokens, at any size."""
    if request.param == "many":
        for name, value in {"DIRECT_TOKENS": 0, "DIRECT_PAIRS": 0, "MIN_PIECE": 64}.items():
            monkeypatch.setattr(preference_sizes, name, value)
    return request.param


@pytest.fixture
def traffic(monkeypatch) -> Counter:
    """`bytes` that Triton's interpreter loads and stores from now on (an atomic addition is both), and `launches`."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("counted in Triton's interpreter: TRITON_INTERPRET=1 BPO_KERNELS=triton")
    from triton.runtime import interpreter

    moved: Counter = Counter()

    def count(name: str, pointer: int, mask: int, times: int = 1) -> None:
        original = getattr(interpreter.InterpreterBuilder, name)

        def call(self: Any, *arguments: Any) -> Any:
            itemsize = arguments[pointer].get_element_ty().primitive_bitwidth // 8
            moved["bytes"] += times * int(arguments[mask].data.sum()) * itemsize
            return original(self, *arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, call)

    count("create_masked_load", 0, 1)
    count("create_masked_store", 0, 2)
    count("create_atomic_rmw", 1, 3, times=2)
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        moved["launches"] += 1
        return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return moved


def _run(
    operation: Operation, tensors: Sequence[Tensor | None], dtype: torch.dtype, coefficient: Tensor
) -> list[Tensor]:
    """Output and gradients of `operation` at `tensors` cast to `dtype`."""
    inputs = [
        None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in tensors
    ]
    output = operation(*inputs)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, coefficient.to(output.dtype))]


@pytest.fixture
def assert_as_exact_as_eager() -> Callable[..., None]:
    """error(ours) <= error(eager PyTorch in the same dtype) + epsilon, both against eager PyTorch in fp64."""

    def check(ours: Operation, eager: Operation, tensors: Sequence[Tensor | None], coefficient: Tensor) -> None:
        dtype = next(tensor.dtype for tensor in tensors if tensor is not None)
        truth = _run(eager, tensors, torch.float64, coefficient)
        naive = _run(eager, tensors, dtype, coefficient)
        got = _run(ours, tensors, dtype, coefficient)
        for position, (true, rough, value) in enumerate(zip(truth, naive, got, strict=True)):
            assert value.shape == true.shape
            assert value.dtype == (rough.dtype if position else torch.promote_types(dtype, torch.float32))
            if true.numel() == 0:
                continue
            size = float(true.abs().max())
            error, allowed = float((value - true).abs().max()), float((rough - true).abs().max())
            allowed += EPSILON[dtype][min(position, 1)] * max(size, 1e-3)
            assert error <= allowed, f"output {position}: error {error} > {allowed} (largest value {size})"

    return check
