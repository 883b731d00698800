"""The public operations, with the signatures of `plain`: Triton on CUDA, plain PyTorch elsewhere.

The environment variable BPO_KERNELS selects the implementation: `auto` (default), `triton` or `plain`. Each choice is
logged once. Triton is imported at the first call that uses it, so this module imports without Triton. If the selected
implementation fails, an error is raised; there is no silent fallback.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import plain

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "BPO_KERNELS"
CHOICES = ("auto", "triton", "plain")
_logged: set[str] = set()
P = ParamSpec("P")
R = TypeVar("R")


def chosen_implementation(tensor: Tensor) -> str:
    """`triton` or `plain`: the implementation for `tensor`, by its device and dtype.

    Raises:
        ValueError: BPO_KERNELS has an unknown value, or requests Triton where it cannot run.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {choice!r}: set it to one of {', '.join(CHOICES)}")
    if choice == "auto":
        # fp64 is for gradient checks, and the Triton kernels compute in fp32.
        return "triton" if tensor.is_cuda and tensor.dtype is not torch.float64 else "plain"
    if choice == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} is 'triton' but the tensor is on {tensor.device}: move it to a GPU, set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests), or set BPO_KERNELS=auto"
        )
    return choice


def _implementation(operation: str, tensor: Tensor) -> ModuleType:
    """The module that implements `operation` for `tensor`."""
    choice = chosen_implementation(tensor)
    if not torch.compiler.is_compiling() and choice not in _logged:  # in this order: else it is recompiled once logged
        _logged.add(choice)
        logger.info("kernels: %s on %s", choice, tensor.device.type)
    if choice == "plain":
        return plain
    try:
        # Import statements: torch.compile cannot trace importlib.
        from . import (
            linear_logprob,
            linear_preference_loss,
            logprob_gather,
            lora,
            preference_loss,
            second_target,
        )
    except ImportError as error:
        raise ImportError(
            f"kernels: {tensor.device} uses Triton, which cannot be imported ({error}): install triton, "
            f"or set {ENVIRONMENT_VARIABLE}=plain for plain PyTorch"
        ) from error
    modules = {
        "linear_logprob": linear_logprob,
        "linear_preference_loss": linear_preference_loss,
        "logprob_gather": logprob_gather,
        "lora_linear": lora,
        "preference_loss": preference_loss,
        "second_target_logprob": second_target,
    }
    return modules[operation]


def dispatched(twin: Callable[P, R]) -> Callable[P, R]:
    """The operation with `twin`'s name and signature; its first tensor selects the implementation."""
    name = twin.__name__
    first = next(iter(inspect.signature(twin).parameters))

    @functools.wraps(twin)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor: Any = args[0] if args else kwargs[first]
        return getattr(_implementation(name, tensor), name)(*args, **kwargs)

    return operation


logprob_gather = dispatched(plain.logprob_gather)
linear_logprob = dispatched(plain.linear_logprob)
preference_loss = dispatched(plain.preference_loss)
linear_preference_loss = dispatched(plain.linear_preference_loss)
second_target_logprob = dispatched(plain.second_target_logprob)
lora_linear = dispatched(plain.lora_linear)
