"""Attention over packed groups that share their prefixes: one interface, several backends.

A completion attends causally to its own prefix and itself, never to its siblings. The function is registered with
transformers for the text model only; without a layout it is ordinary SDPA, so the same model can also generate.

Shape letters: B batch (always 1 while packed), H query heads, K key heads, T packed tokens, D head size.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bpo.model.attention.choice import BackendName, Choice
from bpo.model.attention.flash import Kernel, attend_flash_2, attend_flash_3, attend_torch_varlen
from bpo.model.attention.flex import flex_attend, flex_plan
from bpo.model.attention.flops import register_flop_formulas
from bpo.model.attention.sdpa import sdpa_attend, sdpa_plan
from bpo.model.attention.varlen import varlen_attend, varlen_plan
from bpo.records import PackedLayout

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """An implementation of attention over a packed row.

    Attributes:
        registered_name: For transformers' `attn_implementation`. Must not contain names such as "flash", for which
            transformers would prepare other masks.
        plan: (layout, device) -> index tensors or masks, the same for all layers.
        attend: (query, key, value, plan, scaling, dropout) -> [B, T, H, D].
        about: Description for the log.
    """

    registered_name: str
    plan: Callable[[PackedLayout, torch.device], Any]
    attend: Callable[..., torch.Tensor]
    about: str


def _varlen(registered_name: str, kernel: Kernel, library: str) -> Backend:
    attend = functools.partial(varlen_attend, kernel=kernel)
    return Backend(registered_name, varlen_plan, attend, f"{library}, one varlen call per layer")


BACKENDS: dict[BackendName, Backend] = {
    "flash3": _varlen("bpo_shared_prefix_varlen_3", attend_flash_3, "flash-attn 3"),
    "flash": _varlen("bpo_shared_prefix_varlen", attend_flash_2, "flash-attn 2"),
    "varlen": _varlen("bpo_shared_prefix_torch_varlen", attend_torch_varlen, "PyTorch's varlen_attn"),
    "flex": Backend("bpo_shared_prefix_blocks", flex_plan, flex_attend, "FlexAttention, one compiled call per layer"),
    "sdpa": Backend("bpo_shared_prefix", sdpa_plan, sdpa_attend, "PyTorch SDPA, two calls per group"),
}


class _PackedBatch:
    """A layout and its plans. Plans are cached per batch, as batches differ in lengths."""

    def __init__(self, layout: PackedLayout):
        self.layout = layout
        self.plans: dict[tuple[BackendName, torch.device], Any] = {}

    def plan(self, backend: BackendName, device: torch.device) -> Any:
        if (backend, device) not in self.plans:
            self.plans[backend, device] = BACKENDS[backend].plan(self.layout, device)
        return self.plans[backend, device]


# A global, not a context variable: CUDA's backward pass runs in its own thread, where gradient checkpointing calls the
# attention again.
_batches: list[_PackedBatch] = []


def is_packed() -> bool:
    """Whether a layout applies now."""
    return bool(_batches)


@contextlib.contextmanager
def packed_layout(layout: PackedLayout) -> Iterator[None]:
    """Applies `layout` to all attention calls; must enclose forward *and* backward (which may recompute layers)."""
    _batches.append(_PackedBatch(layout))
    try:
        yield
    finally:
        _batches.pop()


def shared_prefix_attention(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    backend: BackendName = "sdpa",
) -> torch.Tensor:
    """Softmax attention of every group's prefix and completions.

    For each completion, equals `F.scaled_dot_product_attention(q, k, v, is_causal=True)` on [prefix | completion].
    K may divide H (grouped-query heads).

    Returns:
        [B, T, H, D] in the dtype of `query_BHTD`.

    Raises:
        ValueError: dropout with `flash3`, `varlen` or `flex`, which do not support it.
    """
    return _attend(query_BHTD, key_BKTD, value_BKTD, _PackedBatch(layout), backend, scaling, dropout)


def _attend(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    batch: _PackedBatch,
    backend: BackendName,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    plan = batch.plan(backend, query_BHTD.device)
    return BACKENDS[backend].attend(query_BHTD, key_BKTD, value_BKTD, plan, scaling, dropout)


def _attention_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    backend: BackendName,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if not _batches:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"attention over packed groups does not support {option} of this model; set model.share_prefix=never"
            )
    return _attend(query, key, value, _batches[-1], backend, scaling, dropout), None


def _mask_interface(*args: Any, **kwargs: Any) -> Any:
    if _batches:
        return None  # the layout is the mask
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


@functools.cache
def register(choice: Choice) -> str:
    """Registers a chosen backend with transformers and logs it, once; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    backend = BACKENDS[choice.backend]
    # Not traced by torch.compile, which would compile a layer again for each layout.
    interface = torch.compiler.disable(functools.partial(_attention_interface, backend=choice.backend))
    AttentionInterface.register(backend.registered_name, interface)
    AttentionMaskInterface.register(backend.registered_name, _mask_interface)
    register_flop_formulas()
    logger.info("attention over packed groups: %s (%s)", backend.about, choice.reason)
    return backend.registered_name
