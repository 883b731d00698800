"""Selection of the attention backend for packed groups (`model.attention`), with the reason for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bpo.model.attention.flash import flash_attn_2, flash_attn_3, torch_varlen_attn

# `flash3` is selected for `model.attention: flash` if flash-attn 3 can run. Its results differ in rounding from those
# of flash-attn 2, so the reference store's fingerprint distinguishes the two.
BackendName = Literal["flash3", "flash", "varlen", "flex", "sdpa"]

FLASH_VERSION = (2, 8)
FLASH_MAX_HEAD_SIZE = 256
FLASH_MIN_CAPABILITY = (8, 0)
FLASH_3_CAPABILITY = (9, 0)
# flash-attn pads heads itself; PyTorch's copy of it does so only for SDPA.
VARLEN_HEAD_MULTIPLE = 8
FLEX_MIN_HEAD_SIZE = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """The selected backend, and the reason."""

    backend: BackendName
    reason: str


@dataclass(frozen=True, slots=True)
class Needs:
    """Requirements on the attention backend.

    Attributes:
        device: Device of the computation.
        dtype: Of queries, keys and values.
        head_size: Largest head, in elements; 0 if unknown.
        dropout: Of attention probabilities, in training.
        copies_keys: Whether varlen's copies of keys have as many heads as the queries.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int = 0
    dropout: float = 0.0
    copies_keys: bool = False

    @classmethod
    def of_model(cls, text_config: Any, device: torch.device, dtype: torch.dtype) -> Needs:
        """Requirements of the language model with this transformers config."""
        head_size = getattr(text_config, "head_dim", None)
        head_size = head_size or text_config.hidden_size // text_config.num_attention_heads
        heads = text_config.num_attention_heads
        key_heads = getattr(text_config, "num_key_value_heads", None) or heads
        dropout = getattr(text_config, "attention_dropout", 0.0) or 0.0
        return cls(device, dtype, head_size, dropout, key_heads == heads)


def choose_backend(requested: str, needs: Needs) -> Choice:
    """The backend for `model.attention`.

    `auto` selects, on CUDA, the first of flash (flash-attn 3, then 2), varlen and flex that can run, else sdpa; flex
    before varlen where `needs.copies_keys`. On an H100, a row of 7,430 tokens took 1.82 ms with flex and 2.64 with
    varlen without grouped heads (LLaVA-1.5-7B), 2.27 and 1.53 with them (Qwen2.5-VL-7B).

    Raises:
        ValueError: the requested backend cannot run; gives the reason and the fix.
    """
    if requested == "sdpa":
        return Choice("sdpa", "model.attention is sdpa")
    if requested == "auto":
        if needs.device.type != "cuda":
            return Choice("sdpa", f"on {needs.device.type}")
        candidates = [name for name in _OBSTACLES if name != "flash3" or _is_installed("flash_attn_interface")]
        if needs.copies_keys:
            candidates.sort(key=lambda name: name == "varlen")
    elif requested == "flash" and _is_installed("flash_attn_interface"):
        candidates = ["flash3", "flash"]
    else:
        candidates = [requested]  # type: ignore[list-item]
    refused: dict[str, str] = {}
    for name in candidates:
        why_not = _OBSTACLES[name](needs)
        if why_not is None:
            reasons = [f"not {other}: {why}" for other, why in refused.items()]
            return Choice(name, "; ".join([*reasons, _about(name, requested, needs)]))
        refused[name] = why_not
    if requested == "auto":
        return Choice("sdpa", "; ".join(f"not {name}: {why}" for name, why in refused.items()))
    reasons = list(dict.fromkeys(refused.values()))
    raise ValueError(f"model.attention is {requested}, but {'; '.join(reasons)}; or set model.attention to auto")


def obstacle(backend: BackendName, needs: Needs) -> str | None:
    """Why this backend cannot run, and the fix; None if it can."""
    return None if backend == "sdpa" else _OBSTACLES[backend](needs)


def _about(name: BackendName, requested: str, needs: Needs) -> str:
    libraries = {
        "flash3": f"flash-attn 3 ({_version('flash_attn_3') or 'of unknown version'})",
        "flash": f"flash-attn {_version('flash-attn')}",
        "varlen": f"varlen_attn of PyTorch {torch.__version__}",
    }
    what = libraries.get(name, name)
    chosen = "" if requested == "auto" else f"model.attention is {requested}: "
    return f"{chosen}{what} on {needs.device.type} in {_name(needs.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not_flash_kernel(library: str, needs: Needs) -> str | None:
    """Restrictions of all kernels of the flash-attention family: the first violated one and the fix, or None."""
    if needs.device.type != "cuda":
        return f"{library} needs a CUDA GPU and this is {needs.device.type}: set it to sdpa"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"{library} supports bfloat16 and float16 and model.dtype is {_name(needs.dtype)}: set model.dtype"
    capability = torch.cuda.get_device_capability(needs.device)
    if capability < FLASH_MIN_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"{library} needs compute capability 8.0 and this GPU has {has}: set it to flex"
    if needs.head_size > FLASH_MAX_HEAD_SIZE:
        most = FLASH_MAX_HEAD_SIZE
        return f"{library} supports head sizes up to {most} and this model's is {needs.head_size}: set it to flex"
    return None


def _why_not_flash_3(needs: Needs) -> str | None:
    """Why flash-attn 3 cannot run, and the fix."""
    why_not = _why_not_flash_kernel("flash-attn", needs)
    if why_not is not None:
        return why_not
    capability = torch.cuda.get_device_capability(needs.device)
    if capability != FLASH_3_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"flash-attn 3 needs compute capability 9.0 and this GPU has {has}: pip install 'bpo[flash]'"
    if needs.dropout:
        dropout = needs.dropout
        return f"flash-attn 3 has no dropout and the model's attention_dropout is {dropout}: pip install 'bpo[flash]'"
    if not _is_installed("flash_attn_interface"):
        return "flash-attn 3 is not installed: build it from the `hopper` folder of the flash-attn sources"
    return _why_not_imported(flash_attn_3, f"flash-attn 3 ({_version('flash_attn_3') or 'of unknown version'})")


def _why_not_flash(needs: Needs) -> str | None:
    """Why flash-attn 2 cannot run, and the fix."""
    why_not = _why_not_flash_kernel("flash-attn", needs)
    if why_not is not None:
        return why_not
    version = _version("flash-attn")
    if version is None:
        return "flash-attn is not installed: pip install 'bpo[flash]'"
    if tuple(int(part) for part in version.split(".")[:2]) < FLASH_VERSION:
        return f"flash-attn is {version}: pip install 'bpo[flash]' for 2.8 or newer"
    return _why_not_imported(flash_attn_2, f"flash-attn {version}")


def _why_not_imported(look_up: Callable[[], Any], library: str) -> str | None:
    try:
        look_up()
    except ImportError as error:
        return f"{library} cannot be imported ({error}): reinstall it for PyTorch {torch.__version__}"
    return None


def _why_not_varlen(needs: Needs) -> str | None:
    """Why PyTorch's varlen_attn cannot run, and the fix."""
    why_not = _why_not_flash_kernel("varlen_attn", needs)
    if why_not is not None:
        return why_not
    if needs.head_size % VARLEN_HEAD_MULTIPLE:
        return f"varlen_attn supports head sizes divisible by 8 and this model's is {needs.head_size}: set it to flex"
    if needs.dropout:
        return f"varlen_attn has no dropout and the model's attention_dropout is {needs.dropout}: set it to sdpa"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"PyTorch {torch.__version__} was built without flash attention: set it to flex"
    try:
        torch_varlen_attn()
    except ImportError as error:
        return f"PyTorch {torch.__version__} has no varlen_attn ({error}): update to 2.11, or set it to flex"
    return None


def _why_not_flex(needs: Needs) -> str | None:
    """Why FlexAttention cannot run, and the fix."""
    if needs.device.type != "cuda":
        return f"FlexAttention has no backward pass on {needs.device.type}: set it to sdpa"
    if 0 < needs.head_size < FLEX_MIN_HEAD_SIZE:
        least = FLEX_MIN_HEAD_SIZE
        return f"FlexAttention supports head sizes from {least} and this model's is {needs.head_size}: set it to sdpa"
    if needs.dropout:
        return f"FlexAttention has no dropout and the model's attention_dropout is {needs.dropout}: set it to sdpa"
    if not _is_installed("triton"):
        return "FlexAttention compiles to Triton, which is not installed: pip install triton"
    return None


# In the order of `auto`.
_OBSTACLES: dict[BackendName, Callable[[Needs], str | None]] = {
    "flash3": _why_not_flash_3,
    "flash": _why_not_flash,
    "varlen": _why_not_varlen,
    "flex": _why_not_flex,
}
