"""Variable-length attention of three libraries with one signature: flash-attn 2, flash-attn 3 and PyTorch.

Each function takes (query_THD, key_RKD, value_RKD, plan, scaling, dropout) and returns [T, H, D]: causal attention of
every sequence of the plan. With fewer queries than keys the mask is aligned bottom-right. K divides H; no library
requires repeated key heads.

Shape letters: T packed tokens, R gathered rows of keys, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from bpo.model.attention.varlen import VarlenPlan

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenPlan, float | None, float], torch.Tensor]


@functools.cache
def flash_attn_2() -> Callable[..., torch.Tensor]:
    """flash-attn's function, imported only here. A replacement must keep its contract."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


@functools.cache
def flash_attn_3() -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """The function of flash-attn's `hopper` folder, a separate package. Early versions also return log-sum-exps."""
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


@functools.cache
def torch_varlen_attn() -> Callable[..., Any]:
    """PyTorch's function, with grouped-query heads enabled.

    Later versions require `enable_gqa`. 2.11 has no such argument and passes the heads to the same kernel, which
    accepts any number of key heads that divides the number of query heads.
    """
    from torch.nn.attention.varlen import varlen_attn

    has_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if has_switch else varlen_attn


def attend_flash_2(
    query_THD: torch.Tensor,
    key_RKD: torch.Tensor,
    value_RKD: torch.Tensor,
    plan: VarlenPlan,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """flash-attn 2. Its backward pass accumulates the gradient of the queries with atomics, unless
    `torch.use_deterministic_algorithms` is on.
    """
    return flash_attn_2()(
        query_THD,
        key_RKD,
        value_RKD,
        cu_seqlens_q=plan.cu_seqlens_q_S1,
        cu_seqlens_k=plan.cu_seqlens_k_S1,
        max_seqlen_q=plan.max_seqlen_q,
        max_seqlen_k=plan.max_seqlen_k,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def attend_flash_3(
    query_THD: torch.Tensor,
    key_RKD: torch.Tensor,
    value_RKD: torch.Tensor,
    plan: VarlenPlan,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """flash-attn 3, for compute capability 9.0; deterministic under the same condition as flash-attn 2.

    Raises:
        ValueError: `dropout` is not 0.
    """
    _refuse_dropout("flash-attn 3", dropout)
    output = flash_attn_3()(
        query_THD,
        key_RKD,
        value_RKD,
        cu_seqlens_q=plan.cu_seqlens_q_S1,
        cu_seqlens_k=plan.cu_seqlens_k_S1,
        max_seqlen_q=plan.max_seqlen_q,
        max_seqlen_k=plan.max_seqlen_k,
        softmax_scale=scaling,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output[0] if isinstance(output, tuple) else output


def attend_torch_varlen(
    query_THD: torch.Tensor,
    key_RKD: torch.Tensor,
    value_RKD: torch.Tensor,
    plan: VarlenPlan,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """PyTorch's copy of flash-attn 2, which itself reads `torch.use_deterministic_algorithms`.

    Raises:
        ValueError: `dropout` is not 0.
    """
    _refuse_dropout("PyTorch's varlen_attn", dropout)
    return torch_varlen_attn()(
        query_THD,
        key_RKD,
        value_RKD,
        plan.cu_seqlens_q_S1,
        plan.cu_seqlens_k_S1,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        scale=scaling,
        window_size=(-1, 0),  # causal
    )


def _refuse_dropout(library: str, dropout: float) -> None:
    if dropout:
        raise ValueError(f"{library} has no dropout, but the model's is {dropout}; set model.attention to sdpa")
