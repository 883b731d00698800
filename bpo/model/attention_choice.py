"""Which way attention over packed groups is computed on a device, and why: `model.attention`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bpo.model.attention_flash import varlen_function

BackendName = Literal["flash", "flex", "sdpa"]

FLASH_VERSION = (2, 8)
FLASH_MAX_HEAD_SIZE = 256
FLASH_MIN_CAPABILITY = (8, 0)
FLEX_MIN_HEAD_SIZE = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it is the one."""

    backend: BackendName
    reason: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What attention must do.

    Attributes:
        device: Where it computes.
        dtype: Of queries, keys and values.
        head_size: Largest head, in elements; 0 where it is not known.
        dropout: Of attention probabilities, in training.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int = 0
    dropout: float = 0.0

    @classmethod
    def of_model(cls, text_config: Any, device: torch.device, dtype: torch.dtype) -> Needs:
        """What the language model with this transformers config asks for."""
        head_size = getattr(text_config, "head_dim", None)
        head_size = head_size or text_config.hidden_size // text_config.num_attention_heads
        return cls(device, dtype, head_size, getattr(text_config, "attention_dropout", 0.0) or 0.0)


def choose_backend(requested: str, needs: Needs) -> Choice:
    """The backend for `model.attention`, or for `auto` the first that can run: flash on CUDA, then flex; sdpa on CPU.

    Raises:
        ValueError: the requested backend cannot run, with the reason and the way out.
    """
    if requested == "sdpa":
        return Choice("sdpa", "model.attention is sdpa")
    if requested == "auto":
        if needs.device.type != "cuda":
            return Choice("sdpa", f"on {needs.device.type}")
        refused: list[str] = []
        for name in ("flash", "flex"):
            why_not = _OBSTACLES[name](needs)
            if why_not is None:
                return Choice(name, "; ".join([*refused, _about(name, needs)]))  # type: ignore[arg-type]
            refused.append(f"not {name}: {why_not}")
        return Choice("sdpa", "; ".join(refused))
    why_not = _OBSTACLES[requested](needs)
    if why_not is not None:
        raise ValueError(f"model.attention is {requested}, but {why_not}; or set model.attention to auto")
    return Choice(requested, f"model.attention is {requested}")  # type: ignore[arg-type]


def _about(name: str, needs: Needs) -> str:
    version = f" {_flash_version()}" if name == "flash" else ""
    return f"{name}{version} on {needs.device.type} in {_name(needs.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flash_version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not_flash(needs: Needs) -> str | None:
    """Why flash-attn cannot serve, and the way out."""
    if needs.device.type != "cuda":
        return f"flash-attn needs a CUDA GPU and this is {needs.device.type}: set it to sdpa"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bfloat16 or float16 and model.dtype gives {_name(needs.dtype)}: set model.dtype"
    capability = torch.cuda.get_device_capability(needs.device)
    if capability < FLASH_MIN_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"flash-attn needs compute capability 8.0 and this GPU has {has}: set it to flex"
    if needs.head_size > FLASH_MAX_HEAD_SIZE:
        most = FLASH_MAX_HEAD_SIZE
        return f"flash-attn's heads have at most {most} elements, this model's {needs.head_size}: set it to flex"
    version = _flash_version()
    if version is None:
        return "flash-attn is not installed: pip install 'bpo[flash]'"
    if tuple(int(part) for part in version.split(".")[:2]) < FLASH_VERSION:
        return f"flash-attn is {version}: pip install 'bpo[flash]' for 2.8 or newer"
    try:
        varlen_function()
    except ImportError as error:
        return f"flash-attn {version} does not import ({error}): reinstall it for PyTorch {torch.__version__}"
    return None


def _why_not_flex(needs: Needs) -> str | None:
    """Why FlexAttention cannot serve, and the way out."""
    if needs.device.type != "cuda":
        return f"FlexAttention has no backward pass on {needs.device.type}: set it to sdpa"
    if 0 < needs.head_size < FLEX_MIN_HEAD_SIZE:
        least = FLEX_MIN_HEAD_SIZE
        return f"FlexAttention's heads have at least {least} elements, this model's {needs.head_size}: set it to sdpa"
    if needs.dropout:
        return f"FlexAttention has no dropout and the model's attention_dropout is {needs.dropout}: set it to sdpa"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention compiles to Triton, which is not installed: pip install triton"
    return None


_OBSTACLES = {"flash": _why_not_flash, "flex": _why_not_flex}
