"""The public operations: Triton on CUDA, plain PyTorch elsewhere, one signature.

Legend: N rows (response tokens), H hidden size, V vocabulary, P pairs.

The environment variable BPO_KERNELS chooses: `auto` (default), `triton` or `plain`. Each choice is logged
once. Triton is imported at the first call that uses it, so this module imports where Triton is missing. An
implementation that was chosen and fails is an error, never a silent change to a slower one.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import plain

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "BPO_KERNELS"
CHOICES = ("auto", "triton", "plain")
_logged: set[str] = set()


def chosen_implementation(tensor: Tensor) -> str:
    """`triton` or `plain`: what the operations use for `tensor` (its device and dtype decide).

    Raises:
        ValueError: BPO_KERNELS holds another word, or asks for Triton where it cannot run.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {choice!r}: set it to one of {', '.join(CHOICES)}")
    if choice == "auto":
        # fp64 is for checking, and Triton's kernels compute in fp32.
        return "triton" if tensor.is_cuda and tensor.dtype is not torch.float64 else "plain"
    if choice == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} is 'triton' but the tensor is on {tensor.device}: move it to a GPU, set "
            "TRITON_INTERPRET=1 before Python starts (slow, for checking), or set BPO_KERNELS=auto"
        )
    return choice


def _implementation(operation: str, tensor: Tensor) -> ModuleType:
    """The module that holds `operation` for `tensor`."""
    choice = chosen_implementation(tensor)
    if choice not in _logged and not torch.compiler.is_compiling():
        _logged.add(choice)
        logger.info("kernels: %s on %s", choice, tensor.device.type)
    if choice == "plain":
        return plain
    try:
        # Import statements, because torch.compile cannot trace importlib.
        from . import linear_logprob, linear_preference_loss, logprob_gather, preference_loss
    except ImportError as error:
        raise ImportError(
            f"kernels: {tensor.device} uses Triton, which cannot be imported ({error}): install triton, "
            f"or set {ENVIRONMENT_VARIABLE}=plain for plain PyTorch"
        ) from error
    modules = {
        "linear_logprob": linear_logprob,
        "linear_preference_loss": linear_preference_loss,
        "logprob_gather": logprob_gather,
        "preference_loss": preference_loss,
    }
    return modules[operation]


def logprob_gather(logits_NV: Tensor, target_N: Tensor, *, inplace_backward: bool = False) -> Tensor:
    """Log-probs of the targets from logits; see `plain.logprob_gather`."""
    operation = _implementation("logprob_gather", logits_NV).logprob_gather
    return operation(logits_NV, target_N, inplace_backward=inplace_backward)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    *,
    mode: str = "auto",
    budget_bytes: int | None = None,
    statistics: bool = False,
) -> Any:
    """Log-probs of the targets from hidden states and the LM head; see `plain.linear_logprob`."""
    return _implementation("linear_logprob", hidden_NH).linear_logprob(
        hidden_NH,
        weight_VH,
        target_N,
        bias,
        softcap,
        scale,
        mode=mode,
        budget_bytes=budget_bytes,
        statistics=statistics,
    )


def preference_loss(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    token_weight_N: Tensor | None = None,
    num_completions: int | None = None,
    completion_starts_K1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and rewards of every pair; see `plain.preference_loss`."""
    return _implementation("preference_loss", policy_logp_N).preference_loss(
        policy_logp_N,
        reference_logp_N,
        completion_of_token_N,
        pairs_P2,
        beta,
        label_smoothing,
        loss_type,
        token_weight_N,
        num_completions,
        completion_starts_K1,
    )


def linear_preference_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    reference: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    beta: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head and preference loss of policy and reference together; see `plain.linear_preference_loss`."""
    return _implementation("linear_preference_loss", hidden_NH).linear_preference_loss(
        hidden_NH, weight_VH, target_N, reference, completion_of_token_N, pairs_P2, beta, **options
    )
